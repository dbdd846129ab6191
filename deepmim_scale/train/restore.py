"""Where a run begins: at its first step, or after the steps of one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from deepmim_scale.checkpoint import files
from deepmim_scale.ds_config import precision_of
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.runs.resume import finished_without_checkpoints
from deepmim_scale.runs.state import read_state
from deepmim_scale.train.prepare import PreparedRun


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    step: int = 0
    updates: int = 0
    """Steps that changed the weights."""
    warnings: tuple[str, ...] = ()


def find_start(prepared: PreparedRun, total_steps: int) -> Start:
    """Where this run goes on; every rank calls it.

    UserError for other data or another precision, RunFailure if no checkpoint is intact.
    """
    found: list[Start | Exception] = [Start()]
    # Digests are read once, by rank 0, and what it finds holds for all.
    if prepared.may_resume and dist.get_rank() == 0:
        try:
            found = [_find(prepared, total_steps)]
        except (UserError, RunFailure) as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    (result,) = found
    if isinstance(result, Exception):
        raise result
    return result


def _find(prepared: PreparedRun, total_steps: int) -> Start:
    config, problems = prepared.config, list[str]()
    output = config.output
    if config.from_step in ("", "latest"):
        folder, problems = files.latest_intact(output)
    else:
        folder = files.resolve(output, config.from_step)
    if folder is None:
        if problems:
            raise RunFailure(
                f"output={output}: no checkpoint is intact ({problems[0]}); delete {output} to "
                "start afresh"
            )
        if finished_without_checkpoints(output, total_steps):
            return Start(step=total_steps)
        for key, value in (("resume", config.resume), ("from", config.from_step)):
            if value in ("required", "latest"):
                raise UserError(f"{key}={value}: {output} holds no checkpoint; check --output")
        return Start()
    state = read_state(folder)
    if state.manifest_sha != prepared.train.sha:
        raise UserError(
            f"data={config.data}: is not the data this run began with; "
            "give the same images or another --output"
        )
    precision = precision_of(prepared.ds_config)
    if state.precision != precision:
        raise UserError(
            f"deepspeed_config={config.deepspeed_config}: precision {precision}, but "
            f"this run began with {state.precision}; give the same or another --output"
        )
    warnings = tuple(f"warning: {problem}; using an older checkpoint" for problem in problems)
    return Start(folder, state.step, state.updates, warnings)
