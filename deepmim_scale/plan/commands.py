"""The command `deepmim-scale plan`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from deepmim_scale.arguments import difference, writable
from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.plan.calibrate import calibrated
from deepmim_scale.plan.cost import WeightGather
from deepmim_scale.plan.hardware import GPUS, NETWORKS, lookup, network_gbytes
from deepmim_scale.plan.planner import enumerate_plans, executed_gather
from deepmim_scale.plan.planner import to_json as plans_to_json
from deepmim_scale.plan.row import Cluster, Plan
from deepmim_scale.presets import load_preset
from deepmim_scale.settings import FrozenConfig, Names, NonNegativeFloat, PositiveInt

JsonPath = Annotated[str, tyro.conf.arg(name="json")]


class PlanArguments(FrozenConfig):
    """Predict time, memory and bytes of every way to run a model on a cluster."""

    preset: str
    """What to train, e.g. mirl_vit_b_48."""
    model: ModelConfig = ModelConfig()
    """The preset's; its flags change it."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each."""
    gpu: str = "a100-80g"
    """v100-16g, v100-32g, a100-40g, a100-80g, h100-80g or h200-141g."""
    network: str = "edr"
    """Between nodes, per node: 10gbe, 25gbe, 100gbe, edr, hdr, 8xhdr, ndr, 8xndr or Gbit/s."""
    network_efficiency: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the line that transfers get; `doctor` measures it."""
    network_latency: NonNegativeFloat = 0.0
    """Of a message between nodes, microseconds."""
    calibrate: Names = ()
    """Runs with traced steps (`--trace N`), of several depths: rates are theirs, not assumed."""
    global_batch: PositiveInt | None = None
    """Images per optimizer step (default: the preset's)."""
    json_path: JsonPath = ""
    """File for the plans as JSON."""


def plan(args: PlanArguments) -> None:
    """Print the fastest plan of each (stages, placement, schedule), and which is best."""
    check_files(args.json_path)
    config = load_preset(args.preset)
    global_batch = args.global_batch or config.global_batch or config.microbatch_size
    cluster = Cluster(
        args.nodes,
        args.gpus_per_node,
        lookup("gpu", args.gpu, GPUS),
        network_gbytes(args.network) * args.network_efficiency,
        args.network_latency * 1e-6,
    )
    if args.calibrate:
        cluster = calibrated(cluster, args.calibrate)
        print(_rates(cluster))
    plans = enumerate_plans(args.model, cluster, global_batch)
    if args.json_path:
        Path(args.json_path).write_text(json.dumps(plans_to_json(plans), indent=1))
    network = args.network if args.network in NETWORKS else f"{args.network} Gbit/s"
    changes = difference(config.replace(model=args.model))
    print(
        f"{' '.join([args.preset, *changes])} on {cluster.num_gpus} x {args.gpu}, "
        f"{network} between nodes, "
        f"{global_batch} images per step (predicted)"
    )
    print(
        "stages replicas  micro-batch  schedule      images/s   MFU   idle  memory/GiB  sent/MB"
        "  reduced/MB  how"
    )
    gather = executed_gather(args.model)
    for row in _shown(plans, gather, executed=True):
        print(_plan_line(row))
    print("beside them, what no run does (all rows: --json):")
    for row in _shown(plans, gather, executed=False):
        print(_plan_line(row))
    print(_verdict(plans))


def _rates(cluster: Cluster) -> str:
    calibration = cluster.calibration
    assert calibration is not None, "only a calibrated cluster has rates"
    lines = ["measured rates, by instruction: GFLOP/s, us per block, us per image"]
    for (kind, split), (flop, block, image) in calibration.coefficients.items():
        rate = f"{1e-9 / flop:10.1f}" if flop else "         -"
        name = f"{kind} (inputs)" if split and kind.endswith("_backward") else kind
        lines.append(f"  {name:28s}{rate} {1e6 * block:10.1f} {1e6 * image:10.1f}")
    return "\n".join(lines)


def _shown(plans: list[Plan], gather: WeightGather, *, executed: bool) -> list[Plan]:
    """The fastest row of each way; what saves memory only where plain data parallelism needs it."""
    plain = [row for row in plans if row.kind == "data_parallel" and row.is_executed]
    crowded = not any(row.fits for row in plain)
    found: dict[tuple[object, ...], Plan] = {}
    for row in plans:
        runs = row.is_executed and row.weight_gather == gather
        saves = row.weights != "autocast" or row.recompute != "none"
        if runs != executed or row.overlap == "none" or (saves and not crowded):
            continue
        way: tuple[object, ...] = (row.kind, row.weights, row.weight_gather, row.recompute)
        found.setdefault((*way, row.stages, row.placement, row.schedule) if runs else way, row)
    return list(found.values())


_HIDDEN = {"none": "after computation", "overlapped": "ideally hidden"}


def _plan_line(row: Plan) -> str:
    name = row.schedule if row.placement == "linear" else f"{row.schedule} on v"
    name = name if row.kind == "pipeline" else row.kind.replace("_", " ")
    full = "" if row.fits else "; does not fit"
    how = [row.layout if row.kind == "pipeline" else f"communication {_HIDDEN[row.overlap]}"]
    how += [f"{row.weight_gather} weight gather"]
    how += ["pure 16-bit weights"] if row.weights == "pure_16bit" else []
    how += [f"recomputes {row.recompute}"] if row.recompute != "none" else []
    return (
        f"{row.stages:6d} {row.replicas:8d}  {row.microbatch:4d} x {row.microbatches:<4d}  "
        f"{name:13s} {row.images_per_second:9.0f} {row.mfu:5.1%} {row.idle_fraction:6.1%} "
        f"{row.memory_bytes / 2**30:11.1f} {row.boundary_bytes / 1e6:8.0f} "
        f"{row.reduction_bytes / 1e6:11.0f}  {', '.join(how)}{full}"
    )


def _verdict(plans: list[Plan]) -> str:
    best = plans[0]
    if not best.fits:
        return "best: none fits the memory; use more GPUs, larger ones or a smaller model"
    # Like with like: what both send in the same types.
    others = [
        row
        for row in plans
        if (row.stages == 1) != (best.stages == 1)
        and row.fits
        and row.is_executed
        and row.weight_gather == best.weight_gather
    ]
    kinds = ("a pipeline", "data parallelism alone, ideally overlapped")
    what, other = kinds[best.stages == 1], kinds[best.stages != 1]
    text = f"best: {what}, --stages {best.stages} --microbatch-size {best.microbatch}"
    if best.stages > 1:
        text += f" --schedule {best.schedule} --placement {best.placement}"
        text += f" --layout {best.layout}"
    if others:
        text += f"; {others[0].step_seconds / best.step_seconds:.2f} times as fast as {other}"
    sharded = [row for row in plans if row.kind == "zero3" and row.overlap == "overlapped"]
    plain = [row for row in sharded if row.weights == "autocast" and row.recompute == "none"]
    fastest = min((row.step_seconds for row in plain if row.fits), default=math.inf)
    if fastest < best.step_seconds:
        text += (
            f"; ZeRO-3 or FSDP2, which no run here does, would reach "
            f"{best.step_seconds / fastest:.2f} times that, ideally overlapped"
        )
    return f"{text}; limited by {best.limit}"


def check_files(json_path: str, picture: str = "", trace: str = "") -> None:
    """UserError unless every file that is asked for can be written."""
    if picture and Path(picture).suffix not in (".png", ".svg"):
        raise UserError(f"picture={picture}: must end in .png or .svg")
    for key, path in (("json", json_path), ("picture", picture), ("trace", trace)):
        if path:
            writable(key, path)
