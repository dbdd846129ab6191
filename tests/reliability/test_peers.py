"""A peer that hangs or dies: every other rank leaves in time and says where it waited.

Plain processes, since a launcher would end the survivors itself.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from free_port import free_port
from PIL import Image

from deepmim_scale.data.samples import write_samples

ROOT = Path(__file__).resolve().parents[2]
WORLD, TIMEOUT = 4, 10.0
HANGING = 300.0
"""Seconds after which a test gives up: how fast the machine is decides nothing."""
RUN = "import sys; from deepmim_scale.train.pretrain import main; main(sys.argv[1:])"
# Rank 1 fails in its fifth forward, not with one of torch's RuntimeErrors.
PLANTED = """
import os
from deepmim_scale.parallel.step import Step

forward, calls = Step._forward, []

def fail(self, step):
    calls.append(step)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        raise KeyError("planted")
    forward(self, step)

Step._forward = fail
"""
LAST_LINE = re.compile(
    r"error: rank (?P<rank>\d) on \S+, stage (?P<stage>\d), micro-batch [01], instruction [a-z_]+"
    r"( \w+ \(peer: stage \d\))?, in \w+\.\w+: .*(Timed out|timeout|Connection|Broken pipe).*"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "samples"
    write_samples(folder)
    return str(folder)


def start(
    folder: Path, *words: str, world: int = WORLD, before: str = ""
) -> list[subprocess.Popen[bytes]]:
    """Ranks of a run without end; what they say is in folder/RANK.stderr."""
    launch = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-c",
        before + RUN,
        "--preset",
        "debug",
        "--output",
        str(folder / "run"),
        "--steps",
        "1000000",
        "--warmup-epochs",
        "0",
        "--microbatches",
        "2",
        "--microbatch-size",
        "2",
        "--validate-every",
        "0",
        "--timeout",
        str(TIMEOUT),
        *words,
    ]
    processes = []
    for rank in range(world):
        environment = os.environ | launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.stderr").open("wb") as stderr:
            processes.append(
                subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr
                )
            )
    return processes


@contextmanager
def training(photos: str, folder: Path, *words: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Four ranks that have taken three steps; all are gone afterwards."""
    processes = start(folder, "--data", photos, *words)
    try:
        metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + HANGING
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3):
            assert all(process.poll() is None for process in processes), said(folder)
            assert time.monotonic() < deadline, "no third step before the deadline"
            time.sleep(0.02)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("*.stderr"))]


def check_survivors(
    processes: list[subprocess.Popen[bytes]],
    victim: int,
    fault: signal.Signals,
    folder: Path,
    stages: int,
) -> list[str]:
    """Let `fault` happen to `victim`; returns the last line of every survivor."""
    os.kill(processes[victim].pid, fault)
    lines = []
    for rank in set(range(WORLD)) - {victim}:
        assert processes[rank].wait(HANGING) == 1, said(folder)[rank]
    for rank in set(range(WORLD)) - {victim}:
        *before, last = said(folder)[rank].splitlines()
        found = LAST_LINE.fullmatch(last)
        assert found, f"rank {rank}, {fault.name} of {victim}: {last!r}"
        assert int(found["rank"]) == rank
        assert int(found["stage"]) == rank * stages // WORLD
        assert not any("Traceback" in line for line in before), before
        lines.append(last)
    return lines


def test_a_rank_that_hangs(photos: str, tmp_path: Path) -> None:
    with training(photos, tmp_path, "--stages", "2") as processes:
        lines = check_survivors(processes, 2, signal.SIGSTOP, tmp_path, stages=2)
    assert any(f"Timed out waiting {TIMEOUT * 1000:.0f}ms" in line for line in lines), lines


def test_a_rank_that_dies(photos: str, tmp_path: Path) -> None:
    """Nobody waits for a rank that is known to be gone: the time-out is longer than the test."""
    words = ["--stages", "4", "--timeout", str(2 * HANGING)]
    with training(photos, tmp_path, *words) as processes:
        lines = check_survivors(processes, 1, signal.SIGKILL, tmp_path, stages=4)
    assert not any("Timed out" in line for line in lines), lines


def test_a_rank_with_an_error_of_its_own(photos: str, tmp_path: Path) -> None:
    """It leaves at once with its own traceback, and reduces no half-finished gradient."""
    processes = start(tmp_path, "--data", photos, "--stages", "1", world=2, before=PLANTED)
    assert [process.wait(HANGING) for process in processes] == [1, 1]
    first, second = said(tmp_path)
    assert "Traceback" in second
    assert re.fullmatch(
        r"error: rank 1 on \S+, stage 0, micro-batch 0, instruction forward, in step\.\w+: "
        r"KeyError: 'planted'",
        second.splitlines()[-1],
    ), second
    assert "Connection" in first.splitlines()[-1], first
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2, "two steps of two micro-batches were whole"


@pytest.mark.soak
@pytest.mark.parametrize("victim", range(WORLD))
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize(
    "words",
    [
        ("--stages", "2", "--schedule", "1f1b"),
        ("--stages", "2", "--reduction", "per_microbatch"),
        ("--stages", "4", "--schedule", "dib_w"),
        ("--stages", "4", "--save-every", "1"),
        ("--stages", "1"),
    ],
    ids=" ".join,
)
def test_any_rank_at_any_moment(
    photos: str, tmp_path: Path, words: tuple[str, ...], fault: signal.Signals, victim: int
) -> None:
    with training(photos, tmp_path, *words) as processes:
        time.sleep(random.random())
        check_survivors(processes, victim, fault, tmp_path, stages=int(words[1]))


@pytest.mark.soak
def test_a_rank_that_cannot_decode(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "data").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "data" / f"{number}.png")
    bad = tmp_path / "data" / "5.png"
    bad.write_bytes(bad.read_bytes()[:3000])
    words = ["--data", str(tmp_path / "data"), "--stages", "2", "--seed", "2"]
    processes = start(tmp_path, *words, world=2)
    assert [process.wait(HANGING) for process in processes] == [1, 2], (
        "seed 2 gives rank 1 the file"
    )
    first, second = (text.splitlines()[-1] for text in said(tmp_path))
    assert re.match(rf"error: step \d+: {bad}: image file is truncated; run", second)
    assert "stages [1] could not decode their images; see their messages" in first
    assert "Traceback" not in "".join(said(tmp_path))
