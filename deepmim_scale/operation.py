"""How a run is kept going: what every training run has, and what changes none of its results."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from deepmim_scale.faults import parse_fault
from deepmim_scale.settings import FrozenConfig, NonNegativeInt, PositiveInt, shown_as

_DURATION = re.compile(r"(?:(\d{1,5})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s?)?")


def seconds_of(duration: str) -> float:
    """Seconds of a duration as 23h30m, 45m, 90s or 90; ValueError for any other text."""
    found = _DURATION.fullmatch(duration)
    if not duration or found is None:
        raise ValueError(f"{duration}: must be a duration, as 23h30m, 45m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def _checked(duration: str) -> str:
    try:
        return duration if not duration or seconds_of(duration) > 0 else _refuse(duration)
    except ValueError:
        return _refuse(duration)


def _refuse(duration: str) -> str:
    raise ValueError(f"stop_after={duration}: must be a duration, as 23h30m, 45m or 90s")


def _parsed(faults: tuple[str, ...]) -> tuple[str, ...]:
    for text in faults:
        parse_fault(text)
    return faults


class Operation(FrozenConfig):
    """Saving, stopping and watching: free to change when a run goes on."""

    timeout: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    """Longest wait for another process, s."""
    stop_after: Annotated[str, AfterValidator(_checked), shown_as("23h30m")] = ""
    """Save and stop after so long; under Slurm also two minutes before the job's end."""
    save_every: NonNegativeInt = 1000
    """Steps between checkpoints, and one after the last step; 0 never."""
    save_minutes: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Minutes after which a checkpoint is due, whatever the steps; 0 counts steps alone."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    digest_every: NonNegativeInt = 0
    """Look for silent corruption in every step, among replicas too every so many; 0 never."""
    inject: Annotated[
        tuple[str, ...], AfterValidator(_parsed), shown_as("KIND:rank=R,step=N ...")
    ] = ()
    """Faults to strike, as kill:rank=2,step=7: kill, hang, slow, nan, bitflip or enospc."""
    print_every: PositiveInt = 20
    """Steps between printed lines; metrics.jsonl has every step."""
    log_to: Annotated[tuple[str, ...], shown_as("tensorboard|wandb|mlflow ...")] = ("tensorboard",)
    """Where the rows of metrics.jsonl go, too; without a name they stay there alone."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto: go on where this run stopped; never: only in an empty folder; required: fail unless
    there is a run to resume."""
