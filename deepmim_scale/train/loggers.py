"""Where rows of metrics go beside metrics.jsonl. No torch before a logger is opened.

A logger is a function from a run to an object of the protocol `Logger`; LOGGERS names them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json, replace_text

PROJECT = "deepmim_scale"
IDS = "loggers.json"


class Logger(Protocol):
    """Takes the numbers of one step after another."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by names such as train/loss and losses/block06."""

    def close(self) -> None:
        """Flush."""


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names that all loggers share."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, int | float) and key != "step":
            found[f"train/{key}"] = value
    return found


def _kept_id(run: Path, name: str, make: Callable[[], str]) -> str:
    """The id of this run at a logger, the same in every start."""
    path = run / IDS
    ids = read_json(path) if path.is_file() else {}
    if name not in ids:
        ids[name] = make()
        replace_text(path, json.dumps(ids, indent=1) + "\n")
    found: str = ids[name]
    return found


class _TensorBoard:
    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports

        self._board = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)

    def close(self) -> None:
        self._board.close()


class _WeightsAndBiases:
    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            dir=str(run),
            id=_kept_id(run, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            config=dict(config),
        )
        # Repeated steps are shown where they belong, instead of being dropped.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class _MlFlow:
    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        # Files need no server and no database; mlflow 3 asks for a word before it writes them.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        where = os.environ.get("MLFLOW_TRACKING_URI", f"file:{(run / 'mlruns').absolute()}")
        self._client = MlflowClient(tracking_uri=where)

        def make() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else None
            number = number or self._client.create_experiment(name)
            created: str = self._client.create_run(number, run_name=run.name).info.run_id
            for key, value in config.items():
                self._client.log_param(created, key, value)
            return created

        self._id = _kept_id(run, "mlflow", make)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(x), now, step) for name, x in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Every row has arrived already."""


# name: (package it needs, what opens it)
LOGGERS: dict[str, tuple[str, Callable[[Path, int, Mapping[str, Any]], Logger]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _WeightsAndBiases),
    "mlflow": ("mlflow", _MlFlow),
}


def check_loggers(names: Sequence[str]) -> None:
    """UserError for a logger that nobody knows or that is not installed."""
    for name in names:
        if name not in LOGGERS:
            known = ", ".join(LOGGERS)
            raise UserError(f"log_to={name}: unknown logger; choose among {known}")
        package = LOGGERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"log_to={name}: is not installed; pip install {package}")


class Loggers:
    """The chosen ones. One that fails is left out; a run does not end for it."""

    def __init__(
        self, names: Sequence[str], run: str, step: int, config: Mapping[str, Any]
    ) -> None:
        self._open: dict[str, Logger] = {}
        for name in names:
            self._try(name, partial(self._begin, name, Path(run), step, config))

    def _begin(self, name: str, run: Path, step: int, config: Mapping[str, Any]) -> None:
        self._open[name] = LOGGERS[name][1](run, step, config)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError:  # a full disk ends a run, whoever meets it
            raise
        except Exception as error:
            self._open.pop(name, None)
            reason = str(error).split("\n")[0]
            print(f"warning: no more rows for {name}: {reason}", flush=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        numbers = numbers_of(row)
        for name, logger in list(self._open.items()):
            self._try(name, partial(logger.write, row["step"], numbers))

    def close(self) -> None:
        """Flush all."""
        for name, logger in list(self._open.items()):
            self._try(name, logger.close)
