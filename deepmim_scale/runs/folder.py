"""The folder of a run: what is in it, and how it is read and written. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepmim_scale.arguments import load_run, writable
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.json_file import read_json

CONFIG = "config.json"
METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
TRACES = "trace_step_*.json"
LOCK = "lock.json"
ALARMS = "alarms.jsonl"
CHECKPOINTS = "checkpoints"
# The one key of a fine-tuned run's config.json.
FINE_TUNED = "finetune"
_STEP = re.compile("step_([0-9]{8})")
_FROM = re.compile("(step_)?([0-9]{1,8})")
# Fields of RunConfig that are paths.
_PATHS = (
    "data",
    "output",
    "deepspeed_config",
    "schedule_file",
    "cache",
    "stage_to",
    "init_from",
)
_LOCAL_TEACHER = "local-dir:"


def step_folder(run: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return Path(run) / CHECKPOINTS / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def list_checkpoints(run: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folders = (Path(run) / CHECKPOINTS).glob("step_*")
    return sorted(folder for folder in folders if step_of(folder) is not None and folder.is_dir())


def named_checkpoint(run: str | Path, from_step: str) -> Path:
    """The checkpoint that `--from` names as step_00000800 or 800; UserError if there is none."""
    found = _FROM.fullmatch(from_step)
    if found is None:
        raise UserError(f"from={from_step}: must be latest or a step, as step_00000800 or 800")
    folder = step_folder(run, int(found[2]))
    if not folder.is_dir():
        steps = ", ".join(str(step_of(folder)) for folder in list_checkpoints(run))
        raise UserError(
            f"from={from_step}: {run} has no checkpoint of that step; "
            f"{f'choose one of {steps}' if steps else 'it has none at all'}"
        )
    return folder


def write_config(config: RunConfig) -> None:
    """Save the resolved configuration; `--config FILE` takes it back, from any folder."""
    path = writable("output", Path(config.output) / CONFIG)
    content = with_paths(config.model_dump(mode="json"), os.path.abspath)
    # Where one start went on, and what went wrong in it, says nothing about the next.
    del content["from_step"], content["inject"]
    path.write_text(json.dumps(content, indent=1) + "\n")


def with_paths(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A run's configuration with `change` applied to every path in it."""
    result = dict(config)
    for key in _PATHS:
        if config.get(key):
            result[key] = change(config[key])
    weights = config["teacher_weights"]
    if Path(weights).exists():  # else one of open_clip's tags
        result["teacher_weights"] = change(weights)
    teacher = config["model"]["teacher"]
    if teacher.startswith(_LOCAL_TEACHER):
        teacher = _LOCAL_TEACHER + change(teacher.removeprefix(_LOCAL_TEACHER))
    elif teacher and Path(teacher).exists():  # else the name of a network
        teacher = change(teacher)
    return result | {"model": config["model"] | {"teacher": teacher}}


def load_run_config(run: str | Path) -> RunConfig:
    """The configuration of a run; UserError if the folder holds none."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise UserError(f"{run}: is no run ({CONFIG} is missing); check the path")
    if fine_tuned(run):
        raise UserError(f"{run}: is a fine-tuned run; give the run of its pre-training")
    return load_run(path)


def fine_tuned(run: str | Path) -> dict[str, Any]:
    """The settings of a fine-tuned run, as plain values; empty for any other folder."""
    path = Path(run) / CONFIG
    found: dict[str, Any] = (read_json(path) if path.is_file() else {}).get(FINE_TUNED, {})
    return found


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in order; a last line that a killed run left unfinished is dropped."""
    *lines, _ = (Path(run) / METRICS).read_text().split("\n")
    return [json.loads(line) for line in lines]


def read_starts(run: str | Path) -> list[dict[str, Any]]:
    """Rows of starts.jsonl in order; UserError where there is none."""
    path = Path(run) / STARTS
    if not path.is_file():
        raise UserError(f"{run}: has not begun ({STARTS} is missing); check the path")
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def writing(run: str | Path) -> Iterator[None]:
    """Turn what ends a write (full disk, vanished folder) into a RunFailure of one line."""
    try:
        yield
    except OSError as error:
        raise write_failure(run, error.strerror or str(error)) from None


def write_failure(run: str | Path, reason: str) -> RunFailure:
    """The failure of a write into a run's folder; names the checkpoint that is left."""
    checkpoints = list_checkpoints(run)
    left = f"last good checkpoint {checkpoints[-1]}" if checkpoints else "no checkpoint is there"
    return RunFailure(
        f"output={run}: cannot be written ({reason}); {left}; make it writable and start again"
    )
