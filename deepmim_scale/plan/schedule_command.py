"""The command `deepmim-scale schedule`: build or read, check, simulate and draw one step."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from deepmim_scale.config import MAX_MICROBATCHES, ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.methods.base import Placement
from deepmim_scale.pipeline.bound import least_idle_fraction
from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem, simulated
from deepmim_scale.pipeline.compatibility import check_combination
from deepmim_scale.pipeline.draw import SIMULATED, draw_gantt, write_trace
from deepmim_scale.pipeline.files import schedule_to_json
from deepmim_scale.pipeline.ir import Durations, Schedule
from deepmim_scale.pipeline.registry import (
    BASELINE,
    DEFAULT,
    SCHEDULES,
    build_schedule,
    find_schedule,
)
from deepmim_scale.pipeline.validate import ScheduleError, validate
from deepmim_scale.plan.commands import JsonPath, check_files
from deepmim_scale.plan.hardware import GPUS, lookup, network_gbytes
from deepmim_scale.plan.partition import Layout, format_layout
from deepmim_scale.plan.resolve import choose_layout, read_schedule
from deepmim_scale.plan.timing import memory_of, pipeline_of, times_of
from deepmim_scale.presets import load_preset
from deepmim_scale.settings import FrozenConfig, PositiveInt


class ScheduleArguments(FrozenConfig):
    """Build, check, simulate and draw the schedule of one optimizer step."""

    preset: str
    """What to train, e.g. deepmim_vit_b_12."""
    stages: PositiveInt | None = None
    """P, ranks of the pipeline; needed unless a file is read."""
    microbatches: PositiveInt | None = None
    """M, micro-batches per step; needed unless a file is read."""
    schedule: Annotated[str, tyro.conf.arg(metavar="|".join(SCHEDULES))] = DEFAULT
    """Order of the instructions; zb_h1 is for comparison and cannot be trained with."""
    schedule_file: str = ""
    """Read a schedule, as --json writes it, instead of building one."""
    placement: Placement = "linear"
    """v puts stages r and 2P - 1 - r on rank r (MIRL)."""
    taps: str = ""
    """DeepMIM: even, even:N or numbers as 3,6,9,12 (default: the preset's)."""
    layout: str = ""
    """Stages as 6d/2d/2d/2d: blocks, and d for a decoder (default: the fastest cut)."""
    microbatch_size: PositiveInt | None = None
    """B, images of a micro-batch (default: the preset's)."""
    gpu: str = "a100-80g"
    """Whose rate turns FLOPs into milliseconds."""
    memory_limit: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Activation memory that a search may use, as a share of 1F1B's."""
    network: str = ""
    """Add transfers over a network, by name or in Gbit/s (default: they take no time)."""
    json_path: JsonPath = ""
    """File for the simulation and the instruction lists as JSON."""
    picture: str = ""
    """File for a Gantt chart, .png or .svg."""
    trace: str = ""
    """File for a Chrome trace."""


def schedule(args: ScheduleArguments) -> None:
    """Print makespan, idle share and memory, and write what was asked for."""
    check_files(args.json_path, args.picture, args.trace)
    config = load_preset(args.preset)
    model = config.model.replace(taps=args.taps) if args.taps else config.model
    layout, given = _read(args, model) if args.schedule_file else (_cut(args, model), None)
    images = args.microbatch_size or config.microbatch_size
    gpu = lookup("gpu", args.gpu, GPUS)
    bandwidth = network_gbytes(args.network) * 1e9 if args.network else float("inf")
    memory = memory_of(model, layout, images)

    def durations(split_backward: bool) -> Durations:
        rate = gpu.peak_tflops * 1e12 * gpu.utilization
        per_byte = 1 / bandwidth
        return times_of(model, layout, images, rate, lambda *_: per_byte, split=split_backward)

    def problem(split_backward: bool) -> SchedulingProblem:
        placement = given.pipeline.placement if given else args.placement
        pipeline = pipeline_of(model, layout, placement)
        count = given.num_microbatches if given else args.microbatches
        assert count is not None, "a schedule that is not read has its micro-batches given"
        return SchedulingProblem(pipeline, count, durations(split_backward), memory)

    baseline = build_schedule(BASELINE, problem(split_backward=False))
    if given is not None:
        built = simulated(given, problem(given.style.split_backward))
    else:
        split = find_schedule(args.schedule).split_backward
        limit = int(args.memory_limit * max(baseline.peaks))
        built = build_schedule(args.schedule, replace(problem(split), memory_limit=limit))
        if max(built.peaks) > limit:
            share = max(built.peaks) / max(baseline.peaks)
            print(f"warning: memory_limit={args.memory_limit:g}: {share:.2f} is the least found")
    speedup = baseline.timeline.makespan / built.timeline.makespan
    _report(args, built, memory, int(gpu.memory_gib * 2**30))
    text = format_layout(layout, model)
    num_microbatches = built.schedule.num_microbatches
    title = (
        f"{args.preset}, {text}, {num_microbatches} micro-batches of {images}, "
        f"{built.schedule.name}: {built.timeline.makespan * 1e3:.1f} ms, "
        f"idle {built.timeline.idle_fraction:.1%}, {speedup:.2f} times {BASELINE}"
    )
    print(title)
    style = built.schedule.style
    least = least_idle_fraction(
        built.schedule.pipeline, num_microbatches, durations(style.split_backward), style
    )
    print(f"no order of these instructions is idle for less than {least:.1%}")
    for rank, (idle, peak) in enumerate(zip(built.timeline.idle, built.peaks, strict=True)):
        print(f"rank {rank}: idle {idle:6.1%}, activations {peak / 2**20:8.1f} MiB")
    if args.json_path:
        Path(args.json_path).write_text(json.dumps(_to_json(built, speedup, text, least), indent=1))
    if args.picture:
        draw_gantt(built.timeline, args.picture, title)
    if args.trace:
        write_trace({SIMULATED: built.timeline}, args.trace)


def _cut(args: ScheduleArguments, model: ModelConfig) -> Layout:
    """Stages for a schedule that is to be built; UserError for what does not go together."""
    for key in ("stages", "microbatches"):
        if getattr(args, key) is None:
            raise UserError(f"{key}: missing; give --{key} N, or --schedule-file FILE")
    assert args.stages is not None, "checked above"
    if args.microbatches is not None and args.microbatches > MAX_MICROBATCHES:
        raise UserError(
            f"microbatches={args.microbatches}: must be at most {MAX_MICROBATCHES}; use larger ones"
        )
    spec = find_schedule(args.schedule)
    # A schedule for comparison is legal where the baseline is.
    name = spec.name if spec.is_trainable else BASELINE
    check_combination(model, args.stages, name, args.placement)
    return choose_layout(model, args.stages, args.placement, args.layout)


def _read(args: ScheduleArguments, model: ModelConfig) -> tuple[Layout, Schedule]:
    layout, given = read_schedule(args.schedule_file, model)
    found = {"stages": given.pipeline.num_ranks, "microbatches": given.num_microbatches}
    for key, value in found.items():
        if getattr(args, key) not in (None, value):
            raise UserError(
                f"{key}={getattr(args, key)}: {args.schedule_file} has {value}; leave {key} out"
            )
    if args.layout:
        raise UserError(f"layout={args.layout}: {args.schedule_file} has its own; leave it out")
    return layout, given


def _report(args: ScheduleArguments, built: BuiltSchedule, memory: Any, limit: int) -> None:
    """Warnings: what would not fit, and too few micro-batches."""
    count, ranks = built.schedule.num_microbatches, built.schedule.pipeline.num_ranks
    try:
        validate(built.schedule, memory, limit)
    except ScheduleError as error:
        print(
            f"warning: gpu={args.gpu}: {error}; use a smaller microbatch_size, or more stages",
            file=sys.stderr,
        )
    if count < ranks:
        print(
            f"warning: microbatches={count} is less than stages={ranks}: ranks are idle "
            f"{built.timeline.idle_fraction:.1%} of the time; use more micro-batches",
            file=sys.stderr,
        )


def _to_json(built: BuiltSchedule, speedup: float, layout: str, least: float) -> dict[str, Any]:
    content = schedule_to_json(built.schedule)
    for rank, entry in enumerate(content["ranks"]):
        entry["idle_fraction"] = built.timeline.idle[rank]
        entry["peak_activation_bytes"] = built.peaks[rank]
    return content | {
        "layout": layout,
        "makespan": built.timeline.makespan,
        "idle_fraction": built.timeline.idle_fraction,
        "least_idle_fraction": least,
        "speedup_over_1f1b": speedup,
    }
