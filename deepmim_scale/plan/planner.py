"""Predicts time, memory and bytes of every way to run a model on a cluster, and says which is best.

Legend: P stages, D replicas, B images of a micro-batch, M micro-batches, G = B * M * D.

Assumptions, to be replaced by measurements: a GPU reaches `Gpu.utilisation` of its peak, less with
small micro-batches (factor B / (B + 2)); every instruction takes its FLOPs at that rate; gradients
are summed by a ring all-reduce in 16 bits, of which as much hides as 60 % of the backward of one
micro-batch lasts; ranks are stage-major, so replicas fill a node first and stages lie across nodes;
loading images and the optimizer take no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from deepmim_scale.config import ConfigError, ModelConfig
from deepmim_scale.plan.cost import Reduction, StageCost, model_cost, stage_cost, zero2_state_bytes
from deepmim_scale.plan.estimate import layout_of, memory_of, messages_of, pipeline_of, times_of
from deepmim_scale.plan.generate import build
from deepmim_scale.plan.hardware import Gpu, mfu
from deepmim_scale.plan.legal import check_combination
from deepmim_scale.plan.partition import Layout, format_layout
from deepmim_scale.plan.schedule import Name, Pipeline, Placement, Times

HIDDEN_SHARE = 0.6
MEMORY_SHARE = 0.9
"""Of a GPU's memory; the rest is for communication buckets, work space and fragmentation."""
MAX_STAGES = 8
MICROBATCHES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_gbytes: float
    """Per node and direction, GB/s."""

    @property
    def num_gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Plan:
    """One way to run, with what it is predicted to need."""

    stages: int
    replicas: int
    microbatch: int
    """Images."""
    microbatches: int
    schedule: Name
    placement: Placement
    reduction: Reduction
    layout: str
    step_seconds: float
    images_per_second: float
    mfu: float
    idle_fraction: float
    reduction_seconds: float
    """Not hidden behind compute."""
    memory_bytes: int
    """Largest of all ranks: weights, gradients, optimizer, activations."""
    activation_bytes: int
    boundary_bytes: int
    """Sent by the busiest rank in one step, all directions."""
    reduction_bytes: int
    """Gradients that the busiest rank sends in one step."""
    fits: bool


def enumerate_plans(model: ModelConfig, cluster: Cluster, global_batch: int) -> list[Plan]:
    """Every legal plan, the fastest that fits first; ConfigError when there is none."""
    plans = list(_plans(model, cluster, global_batch))
    if not plans:
        raise ConfigError(
            f"global_batch={global_batch}: cannot be shared by {cluster.num_gpus} GPUs in "
            f"micro-batches of {MICROBATCHES[0]} or more images; use a multiple of "
            f"{MICROBATCHES[0] * cluster.num_gpus}"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_seconds, plan.memory_bytes))


def to_json(plans: list[Plan]) -> dict[str, Any]:
    """{"best": plan, "plans": [plan, ...]}; best is null when nothing fits the memory."""
    rows = [asdict(plan) for plan in plans]
    return {"best": rows[0] if plans[0].fits else None, "plans": rows}


def _plans(model: ModelConfig, cluster: Cluster, global_batch: int) -> Iterator[Plan]:
    placements: tuple[Placement, ...] = ("v", "linear") if model.method == "mirl" else ("linear",)
    names: tuple[Name, ...] = (
        ("1f1b", "dib") if model.method == "mirl" else ("1f1b", "dib", "dib_w")
    )
    for stages in range(1, min(MAX_STAGES, cluster.num_gpus, model.depth) + 1):
        if cluster.num_gpus % stages:
            continue
        replicas = cluster.num_gpus // stages
        for placement in placements if stages > 1 else placements[-1:]:
            # One stage has nothing to wait for: all schedules are alike, dib needs least memory.
            for name in names if stages > 1 else ("dib",):
                try:
                    check_combination(model, stages, name, placement)
                except ConfigError:
                    continue
                for microbatch in MICROBATCHES:
                    if global_batch % (microbatch * replicas) == 0:
                        yield predict(
                            model, cluster, stages, name, microbatch,
                            global_batch // (microbatch * replicas), placement,
                        )  # fmt: skip


def predict(
    model: ModelConfig,
    cluster: Cluster,
    stages: int,
    schedule: Name,
    microbatch: int,
    microbatches: int,
    placement: Placement = "linear",
) -> Plan:
    """Time, memory and bytes of one plan.

    Beyond 2P micro-batches (8 at least) the schedule is continued at the pace of its slowest rank.
    """
    replicas = cluster.num_gpus // stages
    reduction: Reduction = (
        "per_microbatch" if microbatches == 1 and schedule != "dib_w" else "coalesced"
    )
    limit = MEMORY_SHARE * cluster.gpu.memory_gib * 2**30

    def state_bytes(cost: StageCost) -> int:
        return zero2_state_bytes(cost.whole, replicas, reduction=reduction)

    layout = layout_of(model, stages, placement)
    pipeline = pipeline_of(model, layout, placement)
    rate = cluster.gpu.peak_tflops * 1e12 * cluster.gpu.utilisation * microbatch / (microbatch + 2)
    times = times_of(
        model, layout, microbatch, rate,
        lambda source, target: _seconds_per_byte(cluster, pipeline, replicas, source, target),
        split=schedule == "dib_w",
    )  # fmt: skip
    costs = [stage_cost(model, stage.first, stage.last) for stage in layout]
    states = [sum(state_bytes(costs[s]) for s in pipeline.stages_of(r)) for r in range(stages)]
    first = min(microbatches, max(8, 2 * stages))
    built = build(
        schedule, pipeline, first, times, memory_of(model, layout, microbatch),
        int(limit) - max(states), quick=True,
    )  # fmt: skip
    pace = max(built.timeline.busy) / first
    compute = built.timeline.makespan + (microbatches - first) * pace
    reduction_bytes, exposed = _reduction(cluster, pipeline, costs, replicas, times)
    step = compute + exposed
    memory = max(state + peak for state, peak in zip(states, built.peaks, strict=True))
    rate_of_images = microbatch * microbatches * replicas / step
    busy = sum(built.timeline.busy) / stages / first * microbatches
    flops = model_cost(model).whole.training_flops
    return Plan(
        stages=stages,
        replicas=replicas,
        microbatch=microbatch,
        microbatches=microbatches,
        schedule=schedule,
        placement=placement,
        reduction=reduction,
        layout=format_layout(layout, model),
        step_seconds=step,
        images_per_second=rate_of_images,
        mfu=mfu(flops, rate_of_images / cluster.num_gpus, cluster.gpu),
        idle_fraction=1 - busy / compute,
        reduction_seconds=exposed,
        memory_bytes=memory,
        activation_bytes=max(built.peaks),
        boundary_bytes=microbatches * _boundary_bytes(model, layout, pipeline, microbatch),
        reduction_bytes=reduction_bytes,
        fits=memory <= limit,
    )


def _node(cluster: Cluster, pipeline: Pipeline, replicas: int, stage: int) -> int:
    return pipeline.rank_of(stage) * replicas // cluster.gpus_per_node


def _seconds_per_byte(
    cluster: Cluster, pipeline: Pipeline, replicas: int, source: int, target: int
) -> float:
    """All replicas of a stage in a node send at once and share its network card."""
    if pipeline.rank_of(source) == pipeline.rank_of(target):
        return 0.0
    nodes = {_node(cluster, pipeline, replicas, stage) for stage in (source, target)}
    if len(nodes) == 1:
        return 1 / (cluster.gpu.intra_gbytes * 1e9)
    return min(replicas, cluster.gpus_per_node) / (cluster.network_gbytes * 1e9)


def _reduction(
    cluster: Cluster, pipeline: Pipeline, costs: list[StageCost], replicas: int, times: Times
) -> tuple[int, float]:
    """(bytes, seconds not hidden) of the slowest rank's ring all-reduce of 16-bit gradients."""
    crosses = replicas > cluster.gpus_per_node
    bandwidth = (cluster.network_gbytes if crosses else cluster.gpu.intra_gbytes) * 1e9
    found = []
    for rank in range(pipeline.num_ranks):
        stages = pipeline.stages_of(rank)
        trainable = sum(costs[stage].whole.trainable for stage in stages)
        size = round(2 * (replicas - 1) / replicas * 2 * trainable)
        backward = sum(
            times.compute[kind, stage]
            for stage in stages
            for kind in ("encoder_backward", "decoder_backward")
        )
        found.append((size, max(0.0, size / bandwidth - HIDDEN_SHARE * backward)))
    return max(size for size, _ in found), max(seconds for _, seconds in found)


def _boundary_bytes(model: ModelConfig, layout: Layout, pipeline: Pipeline, microbatch: int) -> int:
    """Sent by the busiest rank for one micro-batch."""
    sent = [0] * pipeline.num_ranks
    for message in messages_of(model, layout, microbatch):
        rank = pipeline.rank_of(message.source)
        if rank != pipeline.rank_of(message.target):
            sent[rank] += message.num_bytes
    return max(sent)
