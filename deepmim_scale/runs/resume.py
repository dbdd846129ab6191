"""Whether a start may go on in a run's folder, and what becomes of later steps. No torch here."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json
from deepmim_scale.operation import Operation
from deepmim_scale.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    FINE_TUNED,
    LOCK,
    METRICS,
    STARTS,
    list_checkpoints,
    load_run_config,
    named_checkpoint,
    read_metrics,
    step_of,
    with_paths,
)
from deepmim_scale.settings import pluralize

# Changing these does not change what is trained.
_FREE = frozenset(Operation.model_fields) | frozenset(
    {
        "preset",
        "data",
        "output",
        "deepspeed_config",
        "microbatch_size",
        "microbatches",
        "stages",
        "schedule",
        "schedule_file",
        "placement",
        "layout",
        "reschedule_after",
        "recompute",
        "reduction",
        "kernels",
        "compile",
        "loader",
        "decode",
        "loader_threads",
        "prefetch",
        "feed",
        "check_feed",
        "cache",
        "stage_to",
        "on_bad",
        "validate_every",
        "keep_every",
        "log_every",
        "log_blocks",
        "from_step",
        "profile",
    }
)
# But these cut the model, and where no gradient crosses a cut it matters where that is.
_CUT = frozenset({"stages", "placement", "layout", "schedule_file"})
# What a start leaves in a folder before its first step.
_BEFORE_CONFIG = frozenset({LOCK, STARTS})


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    free = _FREE - _CUT if config["gradient_flow"] == "local" else _FREE
    # Older runs saved paths as they were given, relative to where they were started.
    config = with_paths(config, os.path.realpath)
    if config["lr_schedule"] == "wsd":  # up to its decay it does not depend on the length
        free |= {"epochs", "steps"}
    values = {key: value for key, value in config.items() if key not in free and key != "model"}
    return values | config["model"]


def check_output(config: RunConfig) -> bool:
    """Whether the run's folder holds this very run; UserError if it holds something else."""

    def compare() -> tuple[dict[str, Any], dict[str, Any]]:
        ours = _compared(config.model_dump(mode="json"))
        # Loaded, an older configuration has today's names and the defaults of younger fields.
        return ours, _compared(load_run_config(config.output).model_dump(mode="json"))

    holds_it = check_folder(config.output, config.resume, config.from_step, compare)
    if holds_it and config.from_step not in ("", "latest"):
        named_checkpoint(config.output, config.from_step)
    return holds_it


def check_folder(
    output: str,
    resume: str,
    from_step: str,
    compare: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
) -> bool:
    """Whether a folder holds the run whose values `compare` gives first, the folder's second.

    UserError if it holds something else.
    """
    folder = Path(output)
    saved = folder / CONFIG
    if not saved.is_file() or not _has_begun(folder):
        if not saved.is_file() and _holds_other_files(folder):
            raise UserError(f"output={folder}: holds other files; choose an empty folder")
        for key, value in (("resume", resume), ("from", from_step)):
            if value not in ("auto", "never", ""):
                raise UserError(f"{key}={value}: {folder} holds no run; check --output")
        return False
    if resume == "never":
        raise UserError(
            f"output={folder}: holds a run; delete it or choose another --output, "
            "or go on with --resume auto"
        )
    ours, theirs = compare()
    different = [
        f"{key} {theirs.get(key)} -> {value}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if different:
        raise UserError(
            f"output={folder}: holds another run ({'; '.join(different[:3])}); "
            "choose another --output"
        )
    return True


def _holds_other_files(folder: Path) -> bool:
    if not folder.is_dir():
        return folder.exists()
    return any(entry.name not in _BEFORE_CONFIG for entry in folder.iterdir())


def _has_begun(folder: Path) -> bool:
    """Whether a run took a step; one that did not may be replaced."""
    metrics = folder / METRICS
    return (folder / CHECKPOINTS).exists() or (metrics.is_file() and metrics.stat().st_size > 0)


def finished_without_checkpoints(run: str | Path, total_steps: int) -> bool:
    """Whether a run that saves nothing came to its last step, as its metrics say.

    A run that saves was cut off before its last checkpoint, and has to be repeated.
    """
    run = Path(run)
    config = read_json(run / CONFIG)
    if (config.get(FINE_TUNED) or config).get("save_every") != 0 or not (run / METRICS).is_file():
        return False
    rows = read_metrics(run)
    return bool(rows) and rows[-1]["step"] >= total_steps


def set_aside(run: str | Path, step: int) -> str:
    """Move what lies after `step`, where a run goes on, out of its way; nothing is deleted.

    Returns what to tell the user; empty if nothing lies there.
    """
    run, stamp = Path(run), time.strftime("%Y%m%d-%H%M%S")
    rows = [row for row in read_metrics(run) if row["step"] > step] if _has_rows(run) else []
    later = [folder for folder in list_checkpoints(run) if (step_of(folder) or 0) > step]
    notes = []
    if rows:
        aside = run / f"metrics.before-{stamp}.jsonl"
        with aside.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        repeated = f"{pluralize(len(rows), 'step is', 'steps are')} repeated"
        notes.append(f"{repeated}; their rows are in {aside}")
    if later:
        # Left in place, they would count as the newest: pruning would delete the new ones.
        target = run / f"{CHECKPOINTS}.before-{stamp}"
        target.mkdir(exist_ok=True)
        for folder in later:
            folder.rename(target / folder.name)
        moved = pluralize(len(later), "later checkpoint is", "later checkpoints are")
        notes.append(f"{moved} in {target}")
    if not notes:
        return ""
    where = f"going on after step {step}" if step else "starting again: no checkpoint yet"
    return "; ".join([f"{where}, {notes[0]}", *notes[1:]])


def _has_rows(run: Path) -> bool:
    return (run / METRICS).is_file()
