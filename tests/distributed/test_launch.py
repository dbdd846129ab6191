"""The command a user types, under every launcher, on real photographs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from free_port import free_port

from deepmim_scale.checkpoint import files
from deepmim_scale.runs.folder import list_checkpoints, read_metrics, step_folder

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port"],
    "python": [sys.executable],
}
# 3 steps of the same 16 images, whatever the number of processes.
SAME = [
    "--preset",
    "debug",
    "--global-batch",
    "16",
    "--microbatch-size",
    "8",
    "--steps",
    "3",
    "--warmup-epochs",
    "0",
    "--blr",
    "0.1",
    "--eps",
    "1e-4",
    "--print-every",
    "1",
]


def pretrain(launcher: str, *words: str) -> subprocess.CompletedProcess[str]:
    port = [] if launcher == "python" else [str(free_port())]
    command = [*LAUNCHERS[launcher], *port, str(ROOT / "launcher" / "pretrain.py"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )


def finished(launcher: str, *words: str) -> subprocess.CompletedProcess[str]:
    done = pretrain(launcher, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def weights(run: Path) -> dict[str, torch.Tensor]:
    return files.read_tensors(files.resolve(run), "weights")


def learned(run: Path) -> list[Any]:
    keys = ("step", "loss", "losses", "grad_norm", "grad_norms", "learning_rate")
    return [[row[key] for key in keys] for row in read_metrics(run)]


@pytest.fixture(scope="module")
def runs(photos: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run under each launcher, and one more under deepspeed."""
    base = tmp_path_factory.mktemp("runs")
    for name in (*LAUNCHERS, "deepspeed again"):
        launcher = name.split()[0]
        done = finished(launcher, *SAME, "--data", photos, "--output", str(base / name))
        spoken = [line for line in done.stdout.splitlines() if line.startswith("step 3/3")]
        assert len(spoken) == 1, f"{name}: only one rank prints:\n{done.stdout}"
    return {name: base / name for name in (*LAUNCHERS, "deepspeed again")}


def test_two_processes_equal_one(runs: dict[str, Path]) -> None:
    one, two = weights(runs["python"]), weights(runs["deepspeed"])
    assert one.keys() == two.keys()
    difference = max((one[name] - two[name]).abs().max().item() for name in one)
    assert difference <= 1e-6
    one_rows, two_rows = read_metrics(runs["python"]), read_metrics(runs["deepspeed"])
    assert [row["loss"] for row in one_rows] == pytest.approx([row["loss"] for row in two_rows])


def test_launchers_agree_and_runs_repeat(runs: dict[str, Path]) -> None:
    assert learned(runs["deepspeed"]) == learned(runs["torchrun"])
    assert learned(runs["deepspeed"]) == learned(runs["deepspeed again"])


def test_run_folder(runs: dict[str, Path]) -> None:
    run = runs["deepspeed"]
    config = json.loads((run / "config.json").read_text())
    assert config["global_batch"] == 16
    assert config["model"]["taps"] == [3, 6, 9, 12]
    row = read_metrics(run)[-1]
    assert set(row["losses"]) == {"block03", "block06", "block09", "block12"}
    assert set(row["grad_norms"]) == {*row["losses"], "encoder"}
    assert len(row["peak_memory_gib"]) == 2
    assert row["images_per_second"] > 0
    assert row["images_per_second_per_gpu"] == pytest.approx(row["images_per_second"] / 2)
    assert "mfu" not in row, "a CPU has no peak to compare with"
    assert row["validation_loss"] > 0
    assert any((run / "tensorboard").iterdir())


def test_second_start_says_it_is_finished(runs: dict[str, Path], photos: str) -> None:
    run = str(runs["python"])
    done = finished("python", *SAME, "--data", photos, "--output", run)
    assert f"finished already: 3 steps, results in {run}" in done.stdout
    other = pretrain(
        "python", *SAME, "--data", photos, "--output", run, "--depth", "24", "--taps", "even"
    )
    assert other.returncode == 2
    assert "holds another run (depth 12 -> 24" in other.stderr
    again = finished("python", "--config", f"{run}/config.json")
    assert "finished already" in again.stdout


def test_kill_and_resume_is_exact(photos: str, tmp_path: Path) -> None:
    words = [
        "--preset",
        "debug",
        "--steps",
        "6",
        "--save-every",
        "2",
        "--warmup-epochs",
        "0",
        "--blr",
        "0.1",
        "--validate-every",
        "0",
        "--data",
        photos,
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished("python", *words, "--output", str(whole))
    launcher = [sys.executable, str(ROOT / "launcher" / "pretrain.py")]
    process = subprocess.Popen(
        [*launcher, *words, "--output", str(killed)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not list_checkpoints(killed) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list_checkpoints(killed), "no checkpoint before the deadline"
    (files.part_folder(step_folder(killed, 99))).mkdir()  # as a killed save leaves behind
    done = finished("python", *words, "--output", str(killed))
    assert "resuming after step" in done.stdout
    assert learned(whole) == learned(killed)
    ours, theirs = weights(whole), weights(killed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_damaged_checkpoint_is_passed_over(photos: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "--preset",
        "debug_mae",
        "--save-every",
        "2",
        "--validate-every",
        "0",
        "--data",
        photos,
        "--output",
        str(run),
    ]
    finished("python", *words, "--steps", "4")
    newest = damage(step_folder(run, 4))
    done = finished("python", *words, "--steps", "4")
    assert f"warning: {newest}: damaged" in done.stdout
    assert "resuming after step 2" in done.stdout
    other = pretrain(
        "python",
        *words,
        "--steps",
        "4",
        "--deepspeed_config",
        str(ROOT / "ds_configs" / "a100_bf16.json"),
    )
    assert other.returncode == 2
    assert "precision bfloat16, but this run began with fp32" in other.stderr
    rows = read_metrics(run)
    for step in (2, 4):
        damage(step_folder(run, step))
    lost = pretrain("python", *words, "--steps", "4")
    assert lost.returncode == 1, "nobody's mistake"
    assert f"output={run}: no checkpoint is intact ({newest}: damaged" in lost.stderr
    assert read_metrics(run) == rows, "a refused start changes nothing"


def damage(checkpoint: Path) -> Path:
    """Flip one bit of its weights."""
    file = checkpoint / "weights_stage00.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def test_profile_writes_a_trace(photos: str, tmp_path: Path) -> None:
    words = [
        "--preset",
        "debug_mirl",
        "--steps",
        "13",
        "--microbatch-size",
        "2",
        "--profile",
        "--validate-every",
        "0",
        "--log-every",
        "5",
    ]
    finished("python", *words, "--data", photos, "--output", str(tmp_path / "run"))
    trace = json.loads((tmp_path / "run" / "trace_rank0.json").read_text())
    assert len(trace["traceEvents"]) > 100
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [5, 10, 13]


def test_bad_input_under_a_launcher(photos: str, tmp_path: Path) -> None:
    done = pretrain(
        "deepspeed",
        "--preset",
        "debug",
        "--data",
        photos,
        "--global-batch",
        "9",
        "--output",
        str(tmp_path / "run"),
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "global_batch=9: must be divisible by microbatch_size x replicas = 8 x 2" in lines[0]
    assert "Traceback" not in done.stderr
