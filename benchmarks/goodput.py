"""Goodput under failures, by real kills of a real run: what a failure costs, and what saves cost.

A run under torchrun saves by `--save-minutes`. Every `--every` seconds one rank is killed, and the
same command is started again at once. Measured: kill to the launcher's end, to the first new step,
the time since the step that was saved, and how long steps stood for saves. From these follows the
goodput at one failure an hour: the share of fault-free steps that is taken.
The copy of a shard is measured apart, at the size that ViT-B/48 has on `--replicas` replicas.

    python benchmarks/goodput.py --kills 5 --json goodput.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deepmim_scale.data.samples import write_samples
from deepmim_scale.models import build_model
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.environment import describe_environment
from deepmim_scale.runs.folder import METRICS, list_checkpoints, read_metrics, read_starts, step_of

ROOT = Path(__file__).resolve().parents[1]
HOUR = 3600.0


def start(run: Path, data: Path, minutes: float, stages: int) -> subprocess.Popen[bytes]:
    """The command that a job script repeats."""
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(stages)]
    words = [
        *("--preset", "debug", "--depth", "2", "--taps", "1", "2", "--decoder-depth", "1"),
        *("--microbatch-size", "2", "--global-batch", "4", "--warmup-epochs", "0"),
        *("--steps", "1000000", "--validate-every", "0", "--stages", str(stages)),
        *("--save-every", "0", "--save-minutes", str(minutes)),
        *("--data", str(data), "--output", str(run)),
    ]
    return subprocess.Popen(
        [*launcher, str(ROOT / "launcher" / "pretrain.py"), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def workers(launcher: int) -> list[int]:
    """The ranks below a launcher."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in found]


def last_step(run: Path) -> int:
    """Of the rows so far."""
    metrics = run / METRICS
    rows = read_metrics(run) if metrics.is_file() else []
    return rows[-1]["step"] if rows else 0


def wait_until_past(run: Path, step: int) -> None:
    """Return when a later step has left its row."""
    while last_step(run) <= step:
        time.sleep(0.05)


def kill_one(run: Path, launcher: subprocess.Popen[bytes], restart: Any) -> dict[str, float]:
    """Kill a rank, start again, and wait for the first step that is new."""
    began, reached = time.perf_counter(), last_step(run)
    os.kill(random.choice(workers(launcher.pid)), signal.SIGKILL)
    launcher.wait()
    ended = time.perf_counter()
    saved = step_of(list_checkpoints(run)[-1]) or 0
    per_step = statistics.median(row["seconds"] for row in read_metrics(run)[1:])
    starts = len(read_starts(run))
    restart()
    while len(read_starts(run)) == starts:  # it sets aside the rows beyond the checkpoint
        time.sleep(0.05)
    time.sleep(0.5)
    wait_until_past(run, saved)
    return {
        "detection": ended - began,
        "restart_and_first_step": time.perf_counter() - ended,
        "repeated": (reached - saved) * per_step,
    }


def shard_copy(replicas: int) -> tuple[float, float]:
    """(seconds, GB) of one rank's copy of ViT-B/48's state, in place of a save's stall."""
    with torch.device("meta"):
        model = build_model(load_preset("deepmim_vit_b_48").model)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad) // replicas
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shard = torch.zeros(3, values, device=device)
    room = torch.zeros(shard.shape, pin_memory=shard.is_cuda)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        room.copy_(shard, non_blocking=True)
        if shard.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times), shard.nbytes / 1e9


def main() -> None:
    """Print what was measured, and what follows from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--every", type=float, default=20.0, help="seconds of steps between kills")
    parser.add_argument("--save-minutes", type=float, default=0.1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=32, help="of ViT-B/48, for the copy")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run, data = Path(folder) / "run", Path(folder) / "samples"
        write_samples(data)
        launchers: list[subprocess.Popen[bytes]] = []

        def restart() -> None:
            launchers.append(start(run, data, args.save_minutes, args.stages))

        restart()
        wait_until_past(run, 1)
        failures = []
        for _ in range(args.kills):
            time.sleep(args.every)
            while not list_checkpoints(run):
                time.sleep(0.1)
            failures.append(kill_one(run, launchers[-1], restart))
        launchers[-1].send_signal(signal.SIGTERM)
        launchers[-1].wait()
        files = [run / METRICS, *run.glob("metrics.before-*.jsonl")]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    stalls = [row["save_stall_ms"] / 1e3 for row in rows if "save_stall_ms" in row]
    seconds, size = shard_copy(args.replicas)
    cost = {key: statistics.mean(f[key] for f in failures) for key in failures[0]}
    interval = 60 * args.save_minutes
    stall = statistics.mean(stalls)
    result = {
        "failures": failures,
        "mean": cost,
        "save_interval": interval,
        "stall": stall,
        "stall_share": stall / interval,
        "b48_shard_gb": size,
        "b48_copy_seconds": seconds,
        "b48_copy_share_of_a_minute": seconds / 60,
        "goodput_one_failure_an_hour": 1 - sum(cost.values()) / HOUR - stall / interval,
        "environment": describe_environment(),
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
