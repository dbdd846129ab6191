"""The folder of a run: what is in it, and whether a command may go on in it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepmim_scale.arguments import load_run, writable
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
# Changing these does not change what is trained.
_FREE = frozenset(
    {
        "preset",
        "data",
        "output",
        "deepspeed_config",
        "microbatch_size",
        "microbatches",
        "stages",
        "schedule",
        "placement",
        "layout",
        "reschedule_after",
        "recompute",
        "reduction",
        "kernels",
        "compile",
        "timeout",
        "loader",
        "decode",
        "loader_threads",
        "prefetch",
        "feed",
        "check_feed",
        "validate_every",
        "save_every",
        "keep_checkpoints",
        "print_every",
        "resume",
        "profile",
    }
)
# But these cut the model, and where no gradient crosses a cut it matters where that is.
_CUT = frozenset({"stages", "placement", "layout"})


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    free = _FREE - _CUT if config["gradient_flow"] == "local" else _FREE
    values = {key: value for key, value in config.items() if key not in free and key != "model"}
    return values | config["model"]


def check_output(config: RunConfig) -> bool:
    """Whether the run's folder holds this very run; UserError if it holds something else."""
    folder = Path(config.output)
    saved = folder / CONFIG
    if not saved.is_file() or not _has_begun(folder):
        if folder.exists() and not saved.is_file() and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"output={folder}: holds other files; choose an empty folder")
        if config.resume == "required":
            raise UserError(f"resume=required: {folder} holds no run; check --output")
        return False
    if config.resume == "never":
        raise UserError(
            f"output={folder}: holds a run; delete it or choose another --output, "
            "or go on with --resume auto"
        )
    ours, theirs = _flat(config.model_dump(mode="json")), _flat(load_run(saved).model_dump(mode="json"))
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


def _has_begun(folder: Path) -> bool:
    """Whether a run took a step; one that did not may be replaced."""
    metrics = folder / METRICS
    return (folder / "checkpoints").exists() or (metrics.is_file() and metrics.stat().st_size > 0)


def write_config(config: RunConfig) -> None:
    """Save the resolved configuration; `--config FILE` takes it back."""
    path = writable("output", Path(config.output) / CONFIG)
    path.write_text(config.model_dump_json(indent=1) + "\n")


def load_run_config(run: str | Path) -> RunConfig:
    """The configuration of a run; UserError if the folder holds none."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise UserError(f"{run}: is no run ({CONFIG} is missing); check the path")
    return load_run(path)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in order; a last line that a killed run left unfinished is dropped."""
    *lines, _ = (Path(run) / METRICS).read_text().split("\n")
    return [json.loads(line) for line in lines]
