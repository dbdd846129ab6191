"""Pipelines by the command a user types, on real photographs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from free_port import free_port

from deepmim_scale.analysis.commands import TimelineArguments, run_timeline
from deepmim_scale.checkpoint import files
from deepmim_scale.cli import main as cli
from deepmim_scale.pipeline.draw import timelines_of
from deepmim_scale.pipeline.ir import COMPUTE_KINDS
from deepmim_scale.runs.folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = str(ROOT / "launcher" / "pretrain.py")
STEPS = 8
# The same 16 images in each step, whatever the number of stages and replicas.
SAME = [
    "--global-batch",
    "16",
    "--steps",
    str(STEPS),
    "--save-every",
    "2",
    "--warmup-epochs",
    "0",
    "--blr",
    "0.1",
    "--eps",
    "1e-4",
    "--validate-every",
    "0.005",
]


def launched(num_processes: int, *words: str) -> list[str]:
    launcher = ["deepspeed", "--num_accelerators", str(num_processes)]
    return [*launcher, "--master_port", str(free_port()), PRETRAIN, *SAME, *words]


def finished(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def kill_after_checkpoint(command: list[str], run: Path) -> None:
    """Kill a launcher and all its ranks at once, when the first checkpoint is there."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 600
    while not files.list_checkpoints(run) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert files.list_checkpoints(run), "no checkpoint before the deadline"


@pytest.fixture(scope="module")
def alone(photos: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """DecodeRequest of the run on one stage, in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finished(
        [
            sys.executable,
            PRETRAIN,
            *SAME,
            "--preset",
            "debug",
            "--microbatch-size",
            "8",
            "--data",
            photos,
            "--output",
            str(run),
        ]
    )
    return read_metrics(run)


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """Training and validation losses, total and by decoder, of all steps."""
    found = []
    for row in rows:
        found += [row["loss"], *row["losses"].values()]
        found += [row["validation_loss"], *row["validation_losses"].values()]
    return found


def test_two_stages_equal_one_and_go_on_as_one(
    photos: str, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    run = tmp_path / "run"
    words = ["--preset", "debug", "--microbatch-size", "2", "--data", photos, "--output", str(run)]
    kill_after_checkpoint(launched(4, *words, "--stages", "2"), run)
    piped = read_metrics(run)
    assert 2 <= len(piped) < STEPS
    assert len(piped[0]["peak_memory_gib"]) == 4
    assert losses(piped) == pytest.approx(losses(alone[: len(piped)]), abs=1e-5)
    told = finished([sys.executable, PRETRAIN, *SAME, *words, "--stages", "1"])
    assert "resuming after step" in told
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert losses(rows) == pytest.approx(losses(alone), abs=1e-6)


def test_folded_mirl_with_few_microbatches(photos: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = finished(
        launched(
            3,
            "--preset",
            "debug_mirl",
            "--placement",
            "v",
            "--stages",
            "3",
            "--microbatch-size",
            "8",
            "--data",
            photos,
            "--output",
            str(run),
            "--trace",
            "3",
        )
    )
    warning = "warning: microbatches=2: fewer than the 3 stages, which idle "
    assert [line for line in told.splitlines() if line.startswith(warning)]
    rows = read_metrics(run)
    assert len(rows) == STEPS
    assert set(rows[-1]["losses"]) == {"pair1_6", "pair2_5", "pair3_4"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert files.read_tensors(files.resolve(run), "weights").keys() >= {"cls_token", "norm.weight"}
    check_trace(run, told)


def check_trace(run: Path, told: str) -> None:
    """The traced step has every rank's instructions, and its shares are all of its time."""
    trace = json.loads((run / "trace_step_00000003.json").read_text())
    assert "step 3 in shares of its time" in told
    assert len(trace["shares_by_rank"]) == 3
    for shares in [trace["shares"], *trace["shares_by_rank"]]:
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= 0
        assert shares["computing"] > 0
    measured, simulated = timelines_of(trace).values()
    expected = {e.instruction for e in simulated.events if e.instruction.kind in COMPUTE_KINDS}
    ran = [e.instruction for e in measured.events if e.instruction.kind in COMPUTE_KINDS]
    assert set(ran) == expected
    assert len(ran) == len(expected)
    assert sum(simulated.busy) == pytest.approx(sum(measured.busy))
    run_timeline(TimelineArguments(run=str(run)))
    assert (run / "timeline.png").stat().st_size > 10_000


def test_deep_images_of_five_channels(tmp_path: Path) -> None:
    """16 bits, no squares: two stages have the bits of one, fed by each other."""
    folder = tmp_path / "five" / "train" / "a"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(20):
        np.save(folder / f"{number}.npy", draw.integers(0, 65536, (30, 40, 5), dtype=np.uint16))
    cli(["data", "stats", str(tmp_path / "five")])
    words = ["--preset", "debug", "--data", str(tmp_path / "five"), "--microbatch-size", "4"]
    words += ["--in-chans", "5", "--img-size", "32", "48", "--steps", "3", "--check-feed", "1"]
    runs = [tmp_path / name for name in ("one", "two")]
    finished([sys.executable, PRETRAIN, *SAME, *words, "--output", str(runs[0])])
    finished(launched(2, *words, "--stages", "2", "--output", str(runs[1])))
    one, two = (read_metrics(run) for run in runs)
    assert [row["loss"] for row in one] == [row["loss"] for row in two]
    weights = [files.read_tensors(files.resolve(run), "weights") for run in runs]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
