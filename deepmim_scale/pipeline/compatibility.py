"""Which method, placement, stages, schedule and reduction go together; all else is refused.

The truth is in the method's combinations and the schedule's spec; this file only compares.
Legend: P stages as the user counts them (ranks of the pipeline).
"""

from __future__ import annotations

from collections.abc import Iterator

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.methods import method_of
from deepmim_scale.methods.base import Placement
from deepmim_scale.objectives import objective_of
from deepmim_scale.pipeline.registry import SCHEDULES, ScheduleSpec, find_schedule


def combinations(model: ModelConfig) -> Iterator[tuple[Placement, int, ScheduleSpec]]:
    """Every legal (placement, stages, schedule) of a model; reductions are the schedule's."""
    for combination in method_of(model).combinations:
        for stages in combination.num_stages(model):
            for spec in SCHEDULES.values():
                # A teacher that follows the whole encoder has no part of it on each stage.
                if _orders(spec, model) and (stages == 1 or not objective_of(model).whole_model):
                    yield combination.placement, stages, spec


def _orders(spec: ScheduleSpec, model: ModelConfig) -> bool:
    return spec.is_trainable and (spec.sums_pairs or not method_of(model).paired)


def check_combination(
    model: ModelConfig,
    num_stages: int,
    schedule: str,
    placement: str = "linear",
    reduction: str = "coalesced",
    gradient_flow: str = "full",
) -> None:
    """UserError, one line with key, value and remedy, for what does not go together."""
    method, spec = method_of(model), find_schedule(schedule)
    check_placement(model, num_stages, placement)
    if not _orders(spec, model):
        names = [other.name for other in SCHEDULES.values() if _orders(other, model)]
        raise _undefined(model, "schedule", schedule, names)
    if reduction not in spec.reductions:
        raise UserError(
            f"reduction={reduction}: schedule={schedule} leaves weight gradients for later and "
            f"needs reduction={spec.reductions[0]}; or use schedule={_whole(model)}"
        )
    if gradient_flow == "local" and not method.local_gradients:
        raise UserError(
            f"gradient_flow=local: {model.method} has blocks without a loss of their own stage; "
            "use gradient_flow=full"
        )


def best_placement(model: ModelConfig, num_stages: int) -> Placement:
    """The method's own placement for so many stages; linear where nothing is to be placed."""
    for combination in method_of(model).combinations:
        if num_stages > 1 and num_stages in combination.num_stages(model):
            return combination.placement
    return "linear"


def check_placement(model: ModelConfig, num_stages: int, placement: str) -> None:
    """UserError unless the model can be cut into so many stages with this placement."""
    method = method_of(model)
    # Coarse to fine, so that the message names the first choice that must change.
    placements = {c.placement: c for c in method.combinations}
    if placement not in placements:
        raise _undefined(model, "placement", placement, list(placements))
    stages = placements[placement].num_stages(model)
    if num_stages not in stages:
        few = len(stages) < 8
        allowed = ", ".join(map(str, stages)) if few else f"{stages[0]} to {stages[-1]}"
        raise UserError(
            f"stages={num_stages}: {model.method} with placement={placement} "
            f"and depth={model.depth} can be cut into {allowed} stages; use one of these"
        )
    if num_stages > 1 and objective_of(model).whole_model:
        raise UserError(
            f"stages={num_stages}: target {model.target} follows the whole encoder and needs one "
            "stage; use --stages 1"
        )


def _whole(model: ModelConfig) -> str:
    """A schedule that leaves nothing for later, the last registered one."""
    return [s.name for s in SCHEDULES.values() if _orders(s, model) and not s.split_backward][-1]


def _undefined(model: ModelConfig, key: str, value: str, allowed: list[str]) -> UserError:
    names = ", ".join(allowed)
    return UserError(
        f"{key}={value}: {model.method} is defined for {key} {names}; use one of these"
    )
