"""Injected faults: what a run says, what it leaves, and that it goes on with equal bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import PATIENCE, SMALL, Launch, digest, last_saved, write_noise

from deepmim_scale.runs.folder import CHECKPOINTS, read_metrics
from deepmim_scale.runs.stop import SAME_SIGNAL_SECONDS

STEPS = 12
WORDS = [*SMALL, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_noise(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def clean(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the weights are after a run that nobody disturbed."""
    run = tmp_path_factory.mktemp("clean") / "run"
    launch = Launch("python", run, *WORDS, "--data", data)
    assert launch.end() == 0, launch.said
    return digest(run)


def errors(launch: Launch) -> list[str]:
    return [line for line in launch.said.splitlines() if line.startswith("error: ")]


def replay(run: Path, step: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "deepmim_scale.cli", "replay", str(run), "--step", str(step)]
    file = run.parent / "replay.json"
    done = subprocess.run(
        [*command, "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {step} from " in done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_step_with_nan_and_its_replay(data: str, tmp_path: Path) -> None:
    """Two replicas; one process repeats their steps to the bit."""
    run = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", "4", "--keep-checkpoints", "9"]
    words += ["--digest-every", "2", "--inject", "nan:rank=1,step=6"]
    launch = Launch("deepspeed", run, *words)
    assert launch.end() == 0, launch.said
    assert "digests: 2 of " in launch.said, "the price is told"
    assert [row["step"] for row in read_metrics(run) if row["skipped"]] == [6]
    (alarm,) = [json.loads(line) for line in (run / "alarms.jsonl").read_text().splitlines()]
    assert (alarm["step"], alarm["found"]) == (6, ["gradients are not finite"])
    assert len(alarm["sample_ids"]) == 4
    assert f"see it again with deepmim-scale replay {run} --step 6" in launch.said
    for step, start in ((3, "the first weights"), (6, "step_00000004"), (12, "step_00000008")):
        found = replay(run, step)
        assert found["equal"] is True, found
        assert (found["step"], found["from"]) == (step, start)
        assert found["applied"], "the fault was not in the step's images"


def test_a_flipped_bit_ends_a_run(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", "2", "--digest-every", "5"]
    launch = Launch("python", run, *words, "--inject", "bitflip:step=6,of=moments")
    assert launch.end() == 1, launch.said
    (line,) = errors(launch)
    assert "error: step 6: silent corruption (rank 0 on " in line
    assert "exp_avg changed between two updates" in line
    assert "go on with --from step_00000004, without that machine" in line


def test_a_disk_that_fills_up(data: str, clean: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*WORDS, "--data", data, "--save-every", "3"]
    launch = Launch("python", run, *words, "--inject", "enospc:step=5")
    assert launch.end() == 1, launch.said
    (line,) = errors(launch)
    assert "cannot be written (No space left on device); last good checkpoint" in line
    assert line.endswith("step_00000003; make it writable and start again")
    assert last_saved(run) == 3
    again = Launch("python", run, *words)
    assert again.end() == 0, again.said
    assert digest(run) == clean


def make_read_only(run: Path) -> None:
    """What a server does that is in trouble; a folder with open files cannot be made so here."""
    place = str(run / CHECKPOINTS)
    for words in (["--bind", place, place], ["-o", "remount,ro,bind", place]):
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")


def make_writable(run: Path) -> None:
    subprocess.run(["umount", str(run / CHECKPOINTS)], check=True)


# (reason in the message, what happens to the run's folder, and its undoing)
LOSSES: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "read-only": (
        "Read-only file system",
        make_read_only,
        make_writable,
    ),
    "vanished": (
        "No such file or directory",
        lambda run: run.rename(run.with_name("elsewhere")),
        lambda run: run.with_name("elsewhere").rename(run),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_folder_that_is_lost(data: str, clean: str, tmp_path: Path, loss: str) -> None:
    run, (reason, lose, undo) = tmp_path / "run", LOSSES[loss]
    words = [*WORDS, "--data", data, "--save-every", "2", "--keep-checkpoints", "9"]
    # Slow steps, so that it happens in the middle.
    launch = Launch("python", run, *words, "--inject", "slow:step=5,seconds=3")
    launch.wait_for(lambda: last_saved(run) >= 4)
    try:
        lose(run)
        assert launch.end() == 1, launch.said
    finally:
        launch.kill()
        undo(run)
    (line,) = errors(launch)
    assert f"output={run}: cannot be written ({reason})" in line
    assert ("last good checkpoint" in line) == (loss == "read-only"), (
        "of a lost folder none is seen"
    )
    assert last_saved(run) == 4
    again = Launch("python", run, *words)
    assert again.end() == 0, again.said
    assert digest(run) == clean


def test_a_second_signal_leaves_at_once(data: str, tmp_path: Path) -> None:
    words = [*WORDS, "--data", data, "--inject", "hang:step=3"]
    launch = Launch("python", tmp_path / "run", *words)
    try:
        launch.wait_for(lambda: "injected before step 3" in launch.said)
        launch.send(signal.SIGTERM)
        launch.send(signal.SIGTERM)  # as launchers do
        time.sleep(SAME_SIGNAL_SECONDS + 0.5)
        assert launch.process.poll() is None, "the first waits for the step"
        launch.send(signal.SIGTERM)
        assert launch.end() == 128 + signal.SIGTERM
    finally:
        launch.kill()
    assert "stopped at once by another SIGTERM" in launch.said


@pytest.mark.soak
def test_random_faults(data: str, clean: str, tmp_path: Path) -> None:
    """FAULTS (default 100) in all; every start has another number of stages."""
    random.seed(0)
    faults, number = int(os.environ.get("FAULTS", "100")), 0
    while faults > 0:
        run, number = tmp_path / f"run{number}", number + 1
        words = [*WORDS, "--data", data, "--save-every", "1", "--timeout", "20"]
        words += ["--keep-checkpoints", "3", "--digest-every", "1"]
        while last_saved(run) < STEPS:
            stages = random.choice([1, 2])
            fault = draw_fault(last_saved(run), stages) if faults > 0 else []
            launch = Launch(
                "torchrun", run, *words, "--stages", str(stages), *fault, processes=stages
            )
            try:
                code = launch.end()
            finally:
                launch.kill()
            faults -= "injected before" in launch.said
            assert code == 0 or fault, launch.said
            if "go on with --from" in launch.said:
                found = launch.said.split("go on with --from ")[1].split(",")[0]
                back = Launch("python", run, *words, "--from", found)
                assert back.end() == 0, back.said
        assert digest(run) == clean, f"run {number}"


def draw_fault(saved: int, ranks: int) -> list[str]:
    """One of all kinds that end a run, in one of its next steps."""
    # One process that hangs has nobody who would notice.
    kinds = ["kill", "enospc", "bitflip", *["hang"] * (ranks > 1)]
    # Of one checkpoint alone nothing would be left.
    kind = random.choice([*kinds, *["damage"] * (saved > 1)])
    place = f"rank={random.randrange(ranks)},step={random.randint(saved + 1, STEPS)}"
    more = {
        "bitflip": f",of={random.choice(['weights', 'moments'])},bit={random.getrandbits(40)}",
        "damage": f",of=checkpoint,bit={random.getrandbits(40)}",
    }
    name = {"damage": "bitflip"}.get(kind, kind)
    words = ["--inject", f"{name}:{place}{more.get(kind, '')}"]
    return [*words, f"kill:{place}"] if kind == "damage" else words
