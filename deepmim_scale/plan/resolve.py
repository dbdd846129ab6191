"""From a run's configuration to the layout and schedule that its processes execute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.builders import BuiltSchedule, build
from deepmim_scale.pipeline.ir import Kind, Placement
from deepmim_scale.pipeline.validate import validate
from deepmim_scale.plan.compatibility import check_combination
from deepmim_scale.plan.partition import Layout, format_layout, parse_layout
from deepmim_scale.plan.timing import (
    layout_of,
    memory_of,
    pipeline_of,
    profiled_times,
    times_of,
)

# Only proportions matter to the order of a schedule.
_FLOPS_PER_SECOND = 1e12


@dataclass(frozen=True)
class TrainingPlan:
    """What a run executes."""

    layout: Layout
    built: BuiltSchedule
    text: str
    """The layout in readable form."""


def choose_layout(model: ModelConfig, stages: int, placement: Placement, text: str) -> Layout:
    """The layout that `text` gives, or the fastest cut; UserError if it does not fit."""
    best = layout_of(model, stages, placement)
    if not text:
        return best
    layout = parse_layout(text, model)
    if len(layout) != len(best):
        raise UserError(
            f"layout={text}: has {len(layout)} stages, but stages={stages} with "
            f"placement={placement} needs {len(best)}; change one of them"
        )
    return layout


def training_plan(
    config: RunConfig,
    num_microbatches: int,
    measured: Mapping[tuple[Kind, int], float] | None = None,
) -> TrainingPlan:
    """Layout and checked schedule of a run; UserError for an illegal combination.

    The schedule is built for times in proportion to FLOPs, or for `measured` seconds by kind and
    stage where they are given.
    """
    model = config.model
    check_combination(
        model,
        config.stages,
        config.schedule,
        config.placement,
        config.reduction,
        config.gradient_flow,
    )
    layout = choose_layout(model, config.stages, config.placement, config.layout)
    text = format_layout(layout, model)
    untapped = [
        stage
        for stage in layout
        if not stage.decoders or model.taps[stage.decoders[-1]] != stage.last
    ]
    if config.gradient_flow == "local" and untapped:
        raise UserError(
            f"gradient_flow=local: layout {text} has blocks that no loss of their stage reaches; "
            "end every stage with a decoder"
        )
    times = times_of(
        model, layout, config.microbatch_size, _FLOPS_PER_SECOND, split=config.schedule == "dib_w"
    )
    if measured is not None:
        times = profiled_times(measured, times)
    built = build(
        config.schedule,
        pipeline_of(model, layout, config.placement, config.gradient_flow),
        num_microbatches,
        times,
        memory_of(model, layout, config.microbatch_size),
    )
    validate(built.schedule)
    return TrainingPlan(layout, built, text)
