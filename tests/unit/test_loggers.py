"""Rows of metrics at TensorBoard, Weights & Biases and MLflow, over two starts of one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.runs.folder import read_metrics
from deepmim_scale.train import loggers
from deepmim_scale.train.loggers import IDS, check_loggers, numbers_of
from deepmim_scale.train.metrics import MetricsWriter

ROWS = [{"step": n, "loss": 1.0 / n, "losses": {"block06": 0.5}, "idle": [0.1]} for n in (1, 2, 3)]


def write(run: Path, name: str, rows: list[dict[str, Any]]) -> None:
    writer = MetricsWriter(RunConfig(log_to=(name,)), str(run), rows[0]["step"] - 1)
    for row in rows:
        writer.write(row)
    writer.close()


def test_names_of_numbers() -> None:
    assert numbers_of(ROWS[1]) == {"train/loss": 0.5, "losses/block06": 0.5}


def test_what_cannot_be_logged_to() -> None:
    with pytest.raises(UserError, match="log_to=paper: unknown logger; choose among tensorboard"):
        check_loggers(["tensorboard", "paper"])
    check_loggers([])


def test_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "absent", ("no_such_package", loggers._TensorBoard))
    with pytest.raises(UserError, match="is not installed; pip install no_such_package"):
        check_loggers(["absent"])


def test_one_that_fails_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
            self.steps: list[int] = []

        def write(self, step: int, numbers: Mapping[str, float]) -> None:
            self.steps.append(step)
            if step == 2:
                raise ValueError("server gone")

        def close(self) -> None:
            raise AssertionError("it is out already")

    monkeypatch.setitem(loggers.LOGGERS, "broken", ("json", Broken))
    write(tmp_path, "broken", ROWS)
    assert capsys.readouterr().out == "warning: no more rows for broken: server gone\n"
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", ROWS[:2])
    first = json.loads((tmp_path / IDS).read_text())["wandb"]
    write(tmp_path, "wandb", ROWS[2:])
    assert json.loads((tmp_path / IDS).read_text())["wandb"] == first
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(first) for folder in folders), "one run at the server"
    assert all(list(folder.glob("*.wandb")) for folder in folders)


def test_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    write(tmp_path, "mlflow", ROWS[:2])
    write(tmp_path, "mlflow", ROWS[2:])
    client = tracking.MlflowClient(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    name = json.loads((tmp_path / IDS).read_text())["mlflow"]
    history = client.get_metric_history(name, "train/loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert client.get_run(name).data.params["seed"] == "0"
