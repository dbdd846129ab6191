"""Predicts time, memory and bytes of every way to run a model on a cluster, and says which is best.

Legend: P stages, D replicas, B images of a micro-batch, M micro-batches, G = B * M * D.

Assumptions, to be replaced by measurements: a GPU reaches `Gpu.utilization` of its peak, less with
small micro-batches (factor B / (B + 2)); every instruction takes its FLOPs at that rate; precision
is autocast; gradients are summed by a ring all-reduce in 16 bits and updated weights gathered in
fp32, neither of which overlaps computation, nor do transfers between stages; ranks are stage-major,
so replicas fill a node first and stages lie across nodes; loading images and the optimizer take no
time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.methods.base import Placement
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.compatibility import combinations
from deepmim_scale.pipeline.ir import Pipeline
from deepmim_scale.pipeline.registry import DEFAULT, Reduction, build_schedule, find_schedule
from deepmim_scale.plan.cost import (
    StageCost,
    model_cost,
    stage_cost,
    zero2_state_bytes,
    zero2_traffic_bytes,
)
from deepmim_scale.plan.hardware import Gpu, mfu
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.partition import Layout, format_layout
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of

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
    schedule: str
    placement: Placement
    reduction: Reduction
    layout: str
    step_seconds: float
    images_per_second: float
    mfu: float
    idle_fraction: float
    reduction_seconds: float
    """Of the slowest rank's gradient reduction and gathering of updated weights; nothing hides."""
    memory_bytes: int
    """Largest of all ranks: weights (a teacher's too), gradients, optimizer, activations."""
    activation_bytes: int
    boundary_bytes: int
    """Sent by the busiest rank in one step, all directions."""
    reduction_bytes: int
    """Gradients, and updated weights after the step, that the busiest rank sends in one step."""
    fits: bool


def enumerate_plans(model: ModelConfig, cluster: Cluster, global_batch: int) -> list[Plan]:
    """Every legal plan, the fastest that fits first; UserError when there is none."""
    plans = list(_plans(model, cluster, global_batch))
    if not plans:
        raise UserError(
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
    for placement, stages, spec in combinations(model):
        if stages > MAX_STAGES or cluster.num_gpus % stages or not spec.is_planned:
            continue
        # One stage has nothing to wait for: all ways are alike, the default needs least memory.
        if stages == 1 and (placement, spec.name) != ("linear", DEFAULT):
            continue
        replicas = cluster.num_gpus // stages
        for microbatch in MICROBATCHES:
            if global_batch % (microbatch * replicas):
                continue
            microbatches = global_batch // (microbatch * replicas)
            # One backward reduces as often either way; shards need less memory.
            reduction = spec.reductions[-1 if microbatches == 1 else 0]
            yield predict(
                model,
                cluster,
                stages,
                spec.name,
                microbatch,
                microbatches,
                placement,
                reduction,
            )


def predict(
    model: ModelConfig,
    cluster: Cluster,
    stages: int,
    schedule: str,
    microbatch: int,
    microbatches: int,
    placement: Placement = "linear",
    reduction: Reduction = "coalesced",
) -> Plan:
    """Time, memory and bytes of one plan, cut for speed or, where that does not fit, for memory.

    Beyond 2P micro-batches (8 at least) the schedule is continued at the pace of its slowest rank.
    """
    replicas = cluster.num_gpus // stages

    def predicted(layout: Layout) -> Plan:
        return _predict(
            model, cluster, layout, schedule, microbatch, microbatches, placement, reduction
        )

    def stage_bytes(stage: int, cost: StageCost) -> int:
        """The need of 1f1b, which no schedule exceeds unless there is room."""
        in_flight = min(microbatches, stages - stage)
        activations = in_flight * microbatch * cost.whole.activation_bytes
        return zero2_state_bytes(cost, replicas, reduction) + activations

    plan = predicted(layout_of(model, stages, placement))
    if not plan.fits:
        with contextlib.suppress(UserError):  # no cut fits
            limit = _usable_bytes(cluster.gpu)
            return predicted(layout_of(model, stages, placement, stage_bytes, limit))
    return plan


def _usable_bytes(gpu: Gpu) -> int:
    return int(MEMORY_SHARE * gpu.memory_gib * 2**30)


def _predict(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    schedule: str,
    microbatch: int,
    microbatches: int,
    placement: Placement,
    reduction: Reduction,
) -> Plan:
    pipeline = pipeline_of(model, layout, placement)
    stages = pipeline.num_ranks
    replicas = cluster.num_gpus // stages
    limit = _usable_bytes(cluster.gpu)
    rate = cluster.gpu.peak_tflops * 1e12 * cluster.gpu.utilization * microbatch / (microbatch + 2)
    times = times_of(
        model,
        layout,
        microbatch,
        rate,
        lambda source, target: _seconds_per_byte(cluster, pipeline, replicas, source, target),
        split=find_schedule(schedule).split_backward,
    )
    held = [
        [stage_cost(model, layout[s].first, layout[s].last) for s in pipeline.stages_of(rank)]
        for rank in range(stages)
    ]
    states = [sum(zero2_state_bytes(cost, replicas, reduction) for cost in costs) for costs in held]
    first = min(microbatches, max(8, 2 * stages))
    problem = SchedulingProblem(
        pipeline,
        first,
        times,
        memory_of(model, layout, microbatch),
        limit - max(states),
        quick=True,
    )
    built = build_schedule(schedule, problem)
    timeline = built.timeline
    pace = max(map(sum, zip(timeline.busy, timeline.receiving, strict=True))) / first
    compute = timeline.makespan + (microbatches - first) * pace
    reductions = microbatches if reduction == "per_microbatch" else 1
    reduction_bytes = max(
        sum(zero2_traffic_bytes(cost, replicas, reductions) for cost in costs) for costs in held
    )
    crosses = replicas > cluster.gpus_per_node
    bandwidth = (cluster.network_gbytes if crosses else cluster.gpu.intra_gbytes) * 1e9
    step = compute + reduction_bytes / bandwidth
    memory = max(state + peak for state, peak in zip(states, built.peaks, strict=True))
    rate_of_images = microbatch * microbatches * replicas / step
    busy = sum(timeline.busy) / stages / first * microbatches
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
        reduction_seconds=reduction_bytes / bandwidth,
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


def _boundary_bytes(model: ModelConfig, layout: Layout, pipeline: Pipeline, microbatch: int) -> int:
    """Sent by the busiest rank for one micro-batch."""
    sent = [0] * pipeline.num_ranks
    for message in transfers_of(model, layout, microbatch):
        rank = pipeline.rank_of(message.source)
        if rank != pipeline.rank_of(message.target):
            sent[rank] += message.num_bytes
    return max(sent)
