"""The schedules by name: what each can do, read by command line, planner, study and executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.builders import (
    BuiltSchedule,
    SchedulingProblem,
    build_1f1b,
    build_gpipe,
    build_in_bubbles,
    build_zb_h1,
)
from deepmim_scale.pipeline.ir import Reduction

DEFAULT = "dib"
"""Also what one stage runs: it has nothing to order and needs least memory."""
BASELINE = "1f1b"
"""What speed-ups are measured against."""


@dataclass(frozen=True)
class ScheduleSpec:
    """One kind of schedule."""

    name: str
    build: Callable[[str, SchedulingProblem], BuiltSchedule]
    """From its name and the problem."""
    describe: str
    split_backward: bool = False
    """Weight gradients are instructions of their own."""
    is_trainable: bool = True
    """Else it is for comparison only."""
    is_planned: bool = True
    """The planner proposes it."""
    sums_pairs: bool = True
    """It orders decoders that are paired over stages."""
    reductions: tuple[Reduction, ...] = ("overlapped", "coalesced", "per_microbatch")


# In the order in which messages list them.
SCHEDULES: dict[str, ScheduleSpec] = {}


def register(spec: ScheduleSpec) -> None:
    """Make a schedule known by its name."""
    SCHEDULES[spec.name] = spec


def find_schedule(name: str) -> ScheduleSpec:
    """The spec of a name; UserError lists those there are."""
    if name not in SCHEDULES:
        names = ", ".join(SCHEDULES)
        raise UserError(f"schedule={name}: unknown; choose one of {names}")
    return SCHEDULES[name]


def build_schedule(name: str, problem: SchedulingProblem) -> BuiltSchedule:
    """The schedule `name` of a problem, with its simulation."""
    return find_schedule(name).build(name, problem)


def trainable_schedules() -> tuple[str, ...]:
    """Names of the schedules that a run may execute."""
    return tuple(spec.name for spec in SCHEDULES.values() if spec.is_trainable)


for _spec in (
    ScheduleSpec("gpipe", build_gpipe, "all forwards, then all backwards", is_planned=False),
    ScheduleSpec("1f1b", build_1f1b, "one forward, one backward, decoders inside the stage"),
    ScheduleSpec(
        "zb_h1",
        build_zb_h1,
        "1f1b with weight gradients apart, for comparison",
        split_backward=True,
        is_trainable=False,
        is_planned=False,
    ),
    ScheduleSpec("dib", build_in_bubbles, "decoders in the bubbles"),
    ScheduleSpec(
        "dib_w",
        partial(build_in_bubbles, split_backward=True),
        "decoders and weight gradients in the bubbles",
        split_backward=True,
        sums_pairs=False,
        # A queued weight gradient appears after its backward call, which then has none to reduce.
        reductions=("overlapped", "coalesced"),
    ),
):
    register(_spec)
