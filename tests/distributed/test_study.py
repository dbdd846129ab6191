"""A study by the command a user types: two real cells of two processes on real photographs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deepmim_scale.checkpoint import files
from deepmim_scale.runs.folder import load_run_config, read_metrics


def test_two_cells(photos: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    words = [
        sys.executable,
        "-m",
        "deepmim_scale.cli",
        "study",
        "--preset",
        "debug",
        "--depths",
        "4",
        "--stages",
        "1,2",
        "--schedules",
        "dib",
        "--steps",
        "3",
        "--warmup-steps",
        "1",
        "--gpus-per-node",
        "2",
        "--data",
        photos,
        "--output",
        str(folder),
        "--",
        "--warmup-epochs",
        "0",
        "--blr",
        "0.1",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    baseline, pipeline = json.loads((folder / "study.json").read_text())["rows"]
    assert (baseline["status"], pipeline["status"]) == ("done", "done")
    assert (baseline["replicas"], pipeline["replicas"]) == (2, 1)
    assert pipeline["equal_loss"] is True, "two stages and two replicas do the same mathematics"
    assert pipeline["ratio_low"] <= pipeline["ratio"] <= pipeline["ratio_high"]
    assert baseline["idle"] < pipeline["idle"] < 1
    runs = [folder / "runs" / f"d4_p{stages}_dib_r0" for stages in (1, 2)]
    for run, stages in zip(runs, (1, 2), strict=True):
        assert load_run_config(run).stages == stages
        losses = [row["loss"] for row in read_metrics(run)]
        assert len(set(losses)) == 3, "it learns"
        assert not files.list_checkpoints(run), "--save-every 0"
    before = [(run / "metrics.jsonl").stat().st_mtime for run in runs]
    again = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    assert [(run / "metrics.jsonl").stat().st_mtime for run in runs] == before
