"""The commands `deepmim-scale plan` and `deepmim-scale schedule`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.config import FrozenConfig, ModelConfig, validated
from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.builders import BuiltSchedule, build
from deepmim_scale.pipeline.draw import draw_gantt, write_trace
from deepmim_scale.pipeline.ir import Name, Placement, to_json
from deepmim_scale.pipeline.validate import ScheduleError, validate
from deepmim_scale.plan.compatibility import check_combination
from deepmim_scale.plan.hardware import GPUS, NETWORKS, lookup
from deepmim_scale.plan.partition import format_layout
from deepmim_scale.plan.planner import Cluster, Plan, enumerate_plans
from deepmim_scale.plan.planner import to_json as plans_to_json
from deepmim_scale.plan.resolve import choose_layout
from deepmim_scale.plan.timing import memory_of, pipeline_of, times_of
from deepmim_scale.presets import load_preset

JsonPath = Annotated[str, tyro.conf.arg(name="json")]


class PlanArguments(FrozenConfig):
    """Predict time, memory and bytes of every way to run a preset on a cluster."""

    preset: str
    """What to train, e.g. mirl_vit_b_48."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each."""
    gpu: str = "a100-80g"
    """v100-16g, v100-32g, a100-40g, a100-80g, h100-80g or h200-141g."""
    network: str = "edr"
    """Between nodes, per node: 10gbe, 25gbe, 100gbe, edr, hdr, 8xhdr, ndr or 8xndr."""
    global_batch: int | None = None
    """Images per optimizer step (default: the preset's)."""
    json_path: JsonPath = ""
    """File for the plans as JSON."""


class ScheduleArguments(FrozenConfig):
    """Build, check, simulate and draw the schedule of one optimizer step."""

    preset: str
    """What to train, e.g. deepmim_vit_b_12."""
    stages: int
    """P, ranks of the pipeline."""
    microbatches: int
    """M, micro-batches per step."""
    schedule: Name = "dib"
    """Order of the instructions; zb_h1 is for comparison and cannot be trained with."""
    placement: Placement = "linear"
    """v puts stages r and 2P - 1 - r on rank r (MIRL)."""
    taps: str = ""
    """DeepMIM: even, even:N or numbers as 3,6,9,12 (default: the preset's)."""
    layout: str = ""
    """Stages as 6d|2d|2d|2d: blocks, and d for a decoder (default: the fastest cut)."""
    microbatch_size: int | None = None
    """B, images of a micro-batch (default: the preset's)."""
    gpu: str = "a100-80g"
    """Whose rate turns FLOPs into milliseconds."""
    network: str = ""
    """Add the time of transfers over this network (default: transfers take no time)."""
    json_path: JsonPath = ""
    """File for the simulation and the instruction lists as JSON."""
    picture: str = ""
    """File for a Gantt chart, .png or .svg."""
    trace: str = ""
    """File for a Chrome trace."""


def plan(args: PlanArguments) -> None:
    """Print the fastest plan of each (stages, placement, schedule), and which is best."""
    for key in ("nodes", "gpus_per_node", "global_batch"):
        _positive(key, getattr(args, key))
    _check_files(args.json_path)
    config = load_preset(args.preset)
    gpu, network = lookup("gpu", args.gpu, GPUS), lookup("network", args.network, NETWORKS)
    global_batch = args.global_batch or config.global_batch or config.microbatch_size
    cluster = Cluster(args.nodes, args.gpus_per_node, gpu, network)
    plans = enumerate_plans(config.model, cluster, global_batch)
    if args.json_path:
        Path(args.json_path).write_text(json.dumps(plans_to_json(plans), indent=1))
    print(
        f"{args.preset} on {cluster.num_gpus} x {args.gpu}, {args.network} between nodes, "
        f"{global_batch} images per step (predicted)"
    )
    print(
        "stages replicas  micro-batch  schedule      images/s   MFU   idle  memory/GiB  sent/MB"
        "  reduced/MB  layout"
    )
    shown: set[tuple[int, str, str]] = set()
    for row in plans:
        way = (row.stages, row.placement, row.schedule)
        if way not in shown:
            print(_plan_line(row))
        shown.add(way)
    print(_verdict(plans))


def _plan_line(row: Plan) -> str:
    name = row.schedule if row.placement == "linear" else f"{row.schedule} on v"
    full = "" if row.fits else "  does not fit"
    return (
        f"{row.stages:6d} {row.replicas:8d}  {row.microbatch:4d} x {row.microbatches:<4d}  "
        f"{name:12s} {row.images_per_second:9.0f} {row.mfu:5.1%} {row.idle_fraction:6.1%} "
        f"{row.memory_bytes / 2**30:11.1f} {row.boundary_bytes / 1e6:8.0f} "
        f"{row.reduction_bytes / 1e6:11.0f}  {row.layout}{full}"
    )


def _verdict(plans: list[Plan]) -> str:
    best = plans[0]
    if not best.fits:
        return "best: none fits the memory; use more GPUs, larger ones or a smaller model"
    others = [row for row in plans if (row.stages == 1) != (best.stages == 1) and row.fits]
    kinds = ("a pipeline", "data parallelism alone")
    what, other = kinds[best.stages == 1], kinds[best.stages != 1]
    text = (
        f"best: {what}, --stages {best.stages} --microbatch-size {best.microbatch} "
        f"--reduction {best.reduction}"
    )
    if best.stages > 1:
        text += f" --schedule {best.schedule} --placement {best.placement}"
        text += f" --layout '{best.layout}'"
    if others:
        text += f"; {others[0].step_seconds / best.step_seconds:.2f} times as fast as {other}"
    return text


def schedule(args: ScheduleArguments) -> None:
    """Print makespan, idle share and memory, and write what was asked for."""
    for key in ("stages", "microbatches", "microbatch_size"):
        _positive(key, getattr(args, key))
    _check_files(args.json_path, args.picture, args.trace)
    config = load_preset(args.preset)
    model = config.model
    if args.taps:
        model = validated(lambda: ModelConfig(**(model.model_dump() | {"taps": args.taps})))
    # The comparison schedule is legal where 1f1b on a linear pipeline is.
    check_combination(
        model, args.stages, "1f1b" if args.schedule == "zb_h1" else args.schedule, args.placement
    )
    layout = choose_layout(model, args.stages, args.placement, args.layout)
    pipeline = pipeline_of(model, layout, args.placement)
    gpu = lookup("gpu", args.gpu, GPUS)
    images = args.microbatch_size or config.microbatch_size
    bandwidth = lookup("network", args.network, NETWORKS) * 1e9 if args.network else float("inf")

    memory = memory_of(model, layout, images)

    def simulated(name: Name) -> BuiltSchedule:
        times = times_of(
            model,
            layout,
            images,
            gpu.peak_tflops * 1e12 * gpu.utilization,
            lambda source, target: 1 / bandwidth,
            split=name in ("dib_w", "zb_h1"),
        )
        return build(name, pipeline, args.microbatches, times, memory)

    built = simulated(args.schedule)
    speedup = simulated("1f1b").timeline.makespan / built.timeline.makespan
    text = format_layout(layout, model)
    timeline = built.timeline
    try:
        validate(built.schedule, memory, int(gpu.memory_gib * 2**30))
    except ScheduleError as error:
        print(
            f"warning: gpu={args.gpu}: {error}; use a smaller microbatch_size, or more stages",
            file=sys.stderr,
        )
    if args.microbatches < args.stages:
        print(
            f"warning: microbatches={args.microbatches} is less than stages={args.stages}: ranks "
            f"are idle {timeline.idle_fraction:.1%} of the time; use more micro-batches",
            file=sys.stderr,
        )
    title = (
        f"{args.preset}, {text}, {args.microbatches} micro-batches of {images}, {args.schedule}: "
        f"{timeline.makespan * 1e3:.1f} ms, idle {timeline.idle_fraction:.1%}, "
        f"{speedup:.2f} times 1f1b"
    )
    print(title)
    for rank, (idle, peak) in enumerate(zip(timeline.idle, built.peaks, strict=True)):
        print(f"rank {rank}: idle {idle:6.1%}, activations {peak / 2**20:8.1f} MiB")
    if args.json_path:
        Path(args.json_path).write_text(json.dumps(_schedule_json(built, speedup, text), indent=1))
    if args.picture:
        draw_gantt(timeline, args.picture, title)
    if args.trace:
        write_trace(timeline, args.trace)


def _schedule_json(built: BuiltSchedule, speedup: float, layout: str) -> dict[str, Any]:
    timeline, lists = built.timeline, built.schedule
    return {
        "schedule": lists.name,
        "layout": layout,
        "placement": lists.pipeline.placement,
        "microbatches": lists.num_microbatches,
        "makespan": timeline.makespan,
        "idle_fraction": timeline.idle_fraction,
        "speedup_over_1f1b": speedup,
        "ranks": [
            {
                "rank": rank,
                "idle_fraction": timeline.idle[rank],
                "peak_activation_bytes": built.peaks[rank],
                "instructions": to_json(lists, rank),
            }
            for rank in range(len(lists.ranks))
        ],
    }


def _positive(key: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{key}={value}: must be positive")


def _check_files(json_path: str, picture: str = "", trace: str = "") -> None:
    if picture and Path(picture).suffix not in (".png", ".svg"):
        raise UserError(f"picture={picture}: must end in .png or .svg")
    for key, path in (("json", json_path), ("picture", picture), ("trace", trace)):
        if path:
            writable(key, path)
