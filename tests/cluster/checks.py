"""One run in one process, and whether another run is the same."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from deepmim_scale.checkpoint import files
from deepmim_scale.runs.folder import METRICS, read_metrics

STEPS, TIMEOUT = 60, 10
TRAIN = (
    *("--preset", "debug", "--data", "samples", "--steps", str(STEPS), "--warmup-epochs", "0"),
    *("--microbatch-size", "4", "--global-batch", "16", "--validate-every", "0"),
    *("--save-every", "10", "--blr", "0.02"),
)

SCRIPT = "launcher/pretrain.py"


def rows(run: Path) -> int:
    """Steps of a run so far."""
    path = run / METRICS
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def check_equal(run: Path, reference: Path) -> None:
    """Every step's loss and, at the end, every weight."""
    ours, theirs = ({row["step"]: row["loss"] for row in read_metrics(r)} for r in (run, reference))
    assert len(ours) == STEPS
    different = [step for step, loss in ours.items() if loss != theirs[step]]
    assert not different, f"losses differ at {different}"
    a, b = (files.read_tensors(files.resolve(r), "weights") for r in (run, reference))
    assert all(torch.equal(a[name], b[name]) for name in b)


def blocks(kind: str) -> list[str]:
    """The commands of docs/cluster.md that are marked with a word."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
    return re.findall(rf"^```bash {kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
