"""What can go wrong before the first step: hosts that differ, ranks that never connect."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from free_port import free_port

from deepmim_scale.data.samples import write_samples

ROOT = Path(__file__).resolve().parents[2]
HANGING = 300.0
STUCK = """
import time
from datetime import timedelta
import torch.distributed as dist
from deepmim_scale.parallel import grid
grid.dist.get_rank = lambda: 0
grid.dist.new_group = lambda *_, **__: time.sleep(300)  # as gloo's passive side may
grid.make_group([[0, 1]], timedelta(seconds=0.1))
"""


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_group_that_never_connects() -> None:
    process = start(["-c", STUCK], RANK="0")
    _, errors = process.communicate(timeout=HANGING)
    assert process.returncode == 1
    line = r"error: rank 0 on \S+, starting, in grid\.make_group: not connected within timeout=0\.1"
    assert re.match(line, errors.splitlines()[-1]), errors


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_hosts_with_other_data(command: str, tmp_path: Path) -> None:
    """Two ranks, as on two hosts, whose folders of the same name differ by one image."""
    write_samples(tmp_path / "a" / "samples")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    next((tmp_path / "b" / "samples" / "train").rglob("*.jpg")).unlink()
    sizes = {"--img-size": 32, "--patch-size": 8, "--embed-dim": 32, "--depth": 2, "--num-heads": 2}
    words = {
        "pretrain": ["--preset", "debug"],
        "finetune": [str(word) for pair in sizes.items() for word in pair],
    }[command]
    words += ["--steps", "1", "--warmup-epochs", "0", "--microbatch-size", "2"]
    words += ["--microbatches", "1"]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank, folder in enumerate("ab"):
        data = ["--data", str(tmp_path / folder / "samples")]
        output = ["--output", str(tmp_path / "run")]
        entry = [str(ROOT / "launcher" / f"{command}.py")]
        environment = master | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start([*entry, *words, *data, *output], **environment))
    ends = [process.communicate(timeout=HANGING) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], ends
    line = ends[0][1].splitlines()[-1]
    assert re.match(r"error: data=\S+: \S+: other images than \S+ has \([\d,]+ images of sha", line)
    assert not list((tmp_path / "run").glob("metrics.jsonl")), "nothing was trained"
