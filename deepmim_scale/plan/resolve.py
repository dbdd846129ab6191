"""From a run's configuration to the layout and schedule that its processes execute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json
from deepmim_scale.methods import method_of
from deepmim_scale.methods.base import Placement
from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem, simulated
from deepmim_scale.pipeline.compatibility import check_combination, check_placement
from deepmim_scale.pipeline.files import schedule_from_json
from deepmim_scale.pipeline.ir import Kind, Schedule
from deepmim_scale.pipeline.registry import DEFAULT, build_schedule, find_schedule
from deepmim_scale.pipeline.simulate import Deadlock
from deepmim_scale.pipeline.validate import ScheduleError, validate
from deepmim_scale.plan.partition import Layout, format_layout, parse_layout
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, profiled_times, times_of

# Only proportions matter to the order of a schedule.
FLOPS_PER_SECOND = 1e12


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


def read_schedule(
    path: str, model: ModelConfig, gradient_flow: str = "full"
) -> tuple[Layout, Schedule]:
    """Layout and schedule of a file, checked; UserError names the first broken rule."""
    content = read_json(path)
    layout, placement = _read_layout(path, content, model)
    pipeline = pipeline_of(model, layout, placement, gradient_flow)
    schedule = schedule_from_json(path, content, pipeline)
    try:
        validate(schedule)
    except (ScheduleError, Deadlock) as error:
        raise UserError(f"{path}: {error}") from None
    return layout, schedule


def _read_layout(
    path: str, content: Mapping[str, Any], model: ModelConfig
) -> tuple[Layout, Placement]:
    text, placement = content.get("layout"), content.get("placement", "linear")
    if not isinstance(text, str):
        raise UserError(f"{path}: layout={text!r:.60}: must be text as 6d/2d/2d/2d")
    if placement not in get_args(Placement):
        names = ", ".join(get_args(Placement))
        raise UserError(f"{path}: placement={placement!r:.60}: must be one of {names}")
    try:
        layout = parse_layout(text, model)
        folded = len(layout) > 1 and placement == "v"
        if folded and len(layout) % 2:
            raise UserError(f"layout={text}: the V needs an even number of stages; add one")
        check_placement(model, len(layout) // 2 if folded else len(layout), placement)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return layout, placement


def training_plan(
    config: RunConfig,
    num_microbatches: int,
    measured: Mapping[tuple[Kind, int], float] | None = None,
) -> TrainingPlan:
    """Layout and checked schedule of a run; UserError for an illegal combination.

    The schedule is read from the run's file, or built for times in proportion to FLOPs, or for
    `measured` seconds by kind and stage where they are given.
    """
    given = None
    if config.schedule_file:
        layout, given = read_schedule(config.schedule_file, config.model, config.gradient_flow)
        _check_file(config, given, num_microbatches)
    else:
        check_combination(
            config.model,
            config.stages,
            config.schedule,
            config.placement,
            config.reduction,
            config.gradient_flow,
        )
        layout = choose_layout(config.model, config.stages, config.placement, config.layout)
    _check_taps(config, layout)
    split = given.style.split_backward if given else find_schedule(config.schedule).split_backward
    if config.compile and split:
        name = given.name if given else config.schedule
        raise UserError(
            f"compile=True: schedule={name} queues weight gradients in Python; "
            f"use schedule {DEFAULT}"
        )
    model, size = config.model, config.microbatch_size
    durations = times_of(model, layout, size, FLOPS_PER_SECOND, split=split)
    if measured is not None:
        durations = profiled_times(measured, durations)
    placement = given.pipeline.placement if given else config.placement
    pipeline = pipeline_of(model, layout, placement, config.gradient_flow)
    memory = memory_of(model, layout, size)
    problem = SchedulingProblem(
        pipeline, num_microbatches, durations, memory, reduction=config.reduction
    )
    built = simulated(given, problem) if given else build_schedule(config.schedule, problem)
    validate(built.schedule)
    return TrainingPlan(layout, built, format_layout(layout, model))


def _check_file(config: RunConfig, schedule: Schedule, num_microbatches: int) -> None:
    """A file's schedule against the flags that it must agree with."""
    path, pipeline = config.schedule_file, schedule.pipeline
    if config.layout:
        raise UserError(f"layout={config.layout}: schedule_file={path} has its own; leave it out")
    if config.reschedule_after:
        raise UserError(
            f"reschedule_after={config.reschedule_after}: schedule_file={path} fixes the order; "
            "leave one of them out"
        )
    if pipeline.num_ranks != config.stages:
        raise UserError(
            f"stages={config.stages}: schedule_file={path} is for {pipeline.num_ranks}; "
            f"use --stages {pipeline.num_ranks}"
        )
    if schedule.num_microbatches != num_microbatches:
        raise UserError(
            f"microbatches={num_microbatches}: schedule_file={path} orders "
            f"{schedule.num_microbatches}; use --microbatches {schedule.num_microbatches}"
        )
    if schedule.style.split_backward and config.reduction == "per_microbatch":
        raise UserError(
            f"reduction={config.reduction}: schedule_file={path} leaves weight gradients for "
            "later; use --reduction overlapped"
        )
    if schedule.style.split_backward and pipeline.paired:
        raise UserError(
            f"schedule_file={path}: leaves weight gradients for later, which "
            f"{config.model.method} is not defined for; use one without split_backward"
        )
    if config.gradient_flow == "local" and not method_of(config.model).local_gradients:
        raise UserError(
            f"gradient_flow=local: {config.model.method} has blocks without a loss of their own "
            "stage; use gradient_flow=full"
        )


def _check_taps(config: RunConfig, layout: Layout) -> None:
    taps = config.model.taps
    ends_untapped = [s for s in layout if not s.decoders or taps[s.decoders[-1]] != s.last]
    if config.gradient_flow == "local" and ends_untapped:
        raise UserError(
            f"gradient_flow=local: layout {format_layout(layout, config.model)} has blocks that no "
            "loss of their stage reaches; end every stage with a decoder"
        )
