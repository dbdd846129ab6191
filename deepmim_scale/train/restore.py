"""Where a run begins: at its first step, or after the steps of one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from deepmim_scale.checkpoint import files
from deepmim_scale.ds_config import precision_of
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.precision import Precision
from deepmim_scale.runs.resume import finished_without_checkpoints
from deepmim_scale.runs.state import CheckpointState, read_state
from deepmim_scale.train.optim import stable_until
from deepmim_scale.train.prepare import PreparedRun


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    step: int = 0
    updates: int = 0
    """Steps that changed the weights."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What a run expects of the checkpoint that it goes on from."""

    output: str
    resume: str
    from_step: str
    data: str
    data_sha: str
    deepspeed_config: str
    precision: Precision
    decay_share: float | None = None
    """Of a run whose length may change before its decay."""


def find_start(prepared: PreparedRun, total_steps: int) -> Start:
    """Where a pre-training run goes on, as `find_checkpoint`."""
    config = prepared.config
    wanted = Wanted(
        config.output,
        config.resume,
        config.from_step,
        config.data,
        prepared.train.sha,
        config.deepspeed_config,
        precision_of(prepared.ds_config),
        config.decay_share if config.lr_schedule == "wsd" else None,
    )
    return find_checkpoint(wanted, prepared.may_resume, total_steps)


def find_checkpoint(wanted: Wanted, may_resume: bool, total_steps: int) -> Start:
    """Where a run goes on; every rank calls it.

    UserError for other data or another precision, RunFailure if no checkpoint is intact.
    """
    found: list[Start | Exception] = [Start()]
    # Digests are read once, by rank 0, and what it finds holds for all.
    if may_resume and dist.get_rank() == 0:
        try:
            found = [_find(wanted, total_steps)]
        except (UserError, RunFailure) as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    (result,) = found
    if isinstance(result, Exception):
        raise result
    return result


def _check_stable(state: CheckpointState, total_steps: int, share: float, output: str) -> None:
    """UserError for another length than the checkpoint's, if the rate has begun to fall."""
    if state.total_steps == total_steps:
        return
    for total in (state.total_steps, total_steps):
        start = stable_until(total, share)
        if state.step > start:
            raise UserError(
                f"steps={total_steps}: the checkpoint after step {state.step} lies in the decay "
                f"of a run of {total}, which begins after {start:g}; choose an earlier one of "
                f"{output} with --from"
            )


def _find(wanted: Wanted, total_steps: int) -> Start:
    output, problems = wanted.output, list[str]()
    if wanted.from_step in ("", "latest"):
        folder, problems = files.latest_intact(output)
    else:
        folder = files.resolve(output, wanted.from_step)
    if folder is None:
        if problems:
            raise RunFailure(
                f"output={output}: no checkpoint is intact ({problems[0]}); delete {output} to "
                "start afresh"
            )
        if finished_without_checkpoints(output, total_steps):
            return Start(step=total_steps)
        for key, value in (("resume", wanted.resume), ("from", wanted.from_step)):
            if value in ("required", "latest"):
                raise UserError(f"{key}={value}: {output} holds no checkpoint; check --output")
        return Start()
    state = read_state(folder)
    if state.manifest_sha != wanted.data_sha:
        raise UserError(
            f"data={wanted.data}: is not the data this run began with; "
            "give the same images or another --output"
        )
    if state.precision != wanted.precision:
        raise UserError(
            f"deepspeed_config={wanted.deepspeed_config}: precision {wanted.precision}, but "
            f"this run began with {state.precision}; give the same or another --output"
        )
    if wanted.decay_share is not None:
        _check_stable(state, total_steps, wanted.decay_share, output)
    warnings = tuple(f"warning: {problem}; using an older checkpoint" for problem in problems)
    return Start(folder, state.step, state.updates, warnings)
