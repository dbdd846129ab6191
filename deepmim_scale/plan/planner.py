"""Predicts time, memory and bytes of every way to run a model on a cluster, and says which is best.

Legend: P stages, D replicas, B images of a micro-batch, M micro-batches, G = B * M * D.

Assumptions, to be replaced by measurements: a GPU reaches `Gpu.utilization` of its peak, less with
small micro-batches (factor B / (B + 2)); every instruction takes its FLOPs at that rate; gradients
go in 16 bits to the owners of their shards, updated weights back to all; messages and sums lie
beside computations at their full rate; ranks are stage-major, so replicas fill a node first and
stages lie across nodes; loading images and the optimizer take no time.

A pipeline's row is the simulation of what a run executes. Data parallelism and ZeRO-3 come twice:
with nothing hidden, and ideally overlapped (the larger of computation and communication), which is
what a user of DDP, ZeRO-2 or FSDP2 reaches at best. The latter is what pipelines are compared with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.methods.base import Placement
from deepmim_scale.objectives import objective_of
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.compatibility import combinations
from deepmim_scale.pipeline.ir import Pipeline, Reduction
from deepmim_scale.pipeline.registry import build_schedule, find_schedule
from deepmim_scale.plan.cost import (
    StageCost,
    WeightGather,
    gradient_traffic_bytes,
    model_cost,
    stage_cost,
    weight_traffic_bytes,
    zero2_state_bytes,
)
from deepmim_scale.plan.data_parallel import data_parallel_rows
from deepmim_scale.plan.hardware import mfu
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.partition import Layout, format_layout
from deepmim_scale.plan.row import Cluster, Plan, flops_rate, replica_seconds, usable_bytes
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of

__all__ = ["Cluster", "Plan", "enumerate_plans", "predict", "to_json"]
MAX_STAGES = (8, 16, 32, 64)
"""More stages than the first number are tried only where nothing fits with fewer: it takes long."""
MICROBATCHES = (8, 16, 32, 64, 128, 256)


def enumerate_plans(model: ModelConfig, cluster: Cluster, global_batch: int) -> list[Plan]:
    """Every legal plan, the fastest that fits and that a run executes first; UserError if none."""
    plans: list[Plan] = []
    fewer = 1
    for most in MAX_STAGES:
        plans += _pipelines(model, cluster, global_batch, fewer, most)
        fewer = most
        if any(plan.fits for plan in plans) or most >= model.depth:
            break
    for microbatch, microbatches in _microbatches(cluster.num_gpus, global_batch):
        plans += data_parallel_rows(model, cluster, microbatch, microbatches)
    if not plans:
        raise UserError(
            f"global_batch={global_batch}: cannot be shared by {cluster.num_gpus} GPUs in "
            f"micro-batches of {MICROBATCHES[0]} or more images; use a multiple of "
            f"{MICROBATCHES[0] * cluster.num_gpus}"
        )
    gather = executed_gather(model)
    return sorted(
        plans,
        key=lambda plan: (
            not (plan.fits and plan.is_executed and plan.weight_gather == gather),
            not plan.fits,
            plan.step_seconds,
            plan.memory_bytes,
        ),
    )


def executed_gather(model: ModelConfig) -> WeightGather:
    """How a run under autocast gathers weights: a teacher that learns from them needs fp32."""
    return "fp32" if objective_of(model).whole_model else "16bit"


def to_json(plans: list[Plan]) -> dict[str, Any]:
    """{"best": plan, "plans": [plan, ...]}; best is null when nothing fits the memory."""
    rows = [asdict(plan) | {"limit": plan.limit} for plan in plans]
    return {"best": rows[0] if plans[0].fits else None, "plans": rows}


def _microbatches(replicas: int, global_batch: int) -> Iterator[tuple[int, int]]:
    """(images, micro-batches) of a replica's share of a step."""
    for microbatch in MICROBATCHES:
        if global_batch % (microbatch * replicas) == 0:
            yield microbatch, global_batch // (microbatch * replicas)


def _pipelines(
    model: ModelConfig, cluster: Cluster, global_batch: int, fewer: int, most: int
) -> Iterator[Plan]:
    for placement, stages, spec in combinations(model):
        if not fewer < stages <= most or cluster.num_gpus % stages or not spec.is_planned:
            continue
        for size, count in _microbatches(cluster.num_gpus // stages, global_batch):
            fp32 = predict(model, cluster, stages, spec.name, size, count, placement)
            yield fp32
            yield with_gather(fp32, "16bit", cluster)


def with_gather(plan: Plan, gather: WeightGather, cluster: Cluster) -> Plan:
    """The same pipeline with its updated weights gathered in another type."""
    # Shares of the traffic: 2 bytes of gradient, and 4 or 2 of weights.
    ratio = {"fp32": 6, "16bit": 4}
    factor = ratio[gather] / ratio[plan.weight_gather]
    sent = round(plan.reduction_bytes * factor)
    saved = replica_seconds(cluster, plan.replicas, plan.reduction_bytes - sent, 0)
    step = plan.step_seconds - saved
    scale = plan.step_seconds / step
    return replace(
        plan,
        weight_gather=gather,
        step_seconds=step,
        images_per_second=plan.images_per_second * scale,
        mfu=plan.mfu * scale,
        reduction_seconds=plan.reduction_seconds - saved,
        reduction_bytes=sent,
    )


def predict(
    model: ModelConfig,
    cluster: Cluster,
    stages: int,
    schedule: str,
    microbatch: int,
    microbatches: int,
    placement: Placement = "linear",
    reduction: Reduction = "overlapped",
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

    def seconds(first: int, last: int) -> float:
        assert cluster.calibration is not None, "only a calibrated cut asks for seconds"
        return cluster.calibration.whole(model, first, last, microbatch)

    cut_by = seconds if cluster.calibration else None
    plan = predicted(layout_of(model, stages, placement, seconds=cut_by))
    if not plan.fits:
        with contextlib.suppress(UserError):  # no cut fits
            limit = usable_bytes(cluster.gpu)
            return predicted(layout_of(model, stages, placement, stage_bytes, limit, cut_by))
    return plan


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
    limit = usable_bytes(cluster.gpu)
    times = times_of(
        model,
        layout,
        microbatch,
        flops_rate(cluster, microbatch),
        lambda source, target: _seconds_per_byte(cluster, pipeline, replicas, source, target),
        lambda source, target: _latency(cluster, pipeline, replicas, source, target),
        split=find_schedule(schedule).split_backward,
        lanes=lambda source, target: _cards(cluster, pipeline, replicas, source, target),
        reduction=lambda part: replica_seconds(
            cluster, replicas, gradient_traffic_bytes(part, replicas)
        ),
        calibration=cluster.calibration,
    )
    held = [
        [stage_cost(model, layout[s].first, layout[s].last) for s in pipeline.stages_of(rank)]
        for rank in range(stages)
    ]
    states = [sum(zero2_state_bytes(cost, replicas, reduction) for cost in costs) for costs in held]
    first = min(microbatches, max(16, 6 * stages))
    problem = SchedulingProblem(
        pipeline,
        first,
        times,
        memory_of(model, layout, microbatch),
        limit - max(states),
        quick=True,
        reduction=reduction,
    )
    built = build_schedule(schedule, problem)
    timeline = built.timeline
    # The slowest of: a rank, a card, and the way of a micro-batch down and up (late messages).
    ends = [
        event.end
        for event in timeline.events
        if event.instruction.kind == "encoder_backward"
        and event.instruction.stage == pipeline.num_stages - 1
    ]
    # In the middle, where the pipe is full.
    quarter = len(ends) // 4
    cycle = (ends[3 * quarter] - ends[quarter]) / (2 * quarter) if quarter else 0.0
    pace = max(max(timeline.busy) / first, cycle, *times.lane_seconds().values())
    exposed = max(timeline.reducing)
    compute = timeline.makespan - exposed + (microbatches - first) * pace
    reductions = microbatches if reduction == "per_microbatch" else 1
    reduction_bytes = max(
        sum(
            reductions * gradient_traffic_bytes(cost, replicas)
            + weight_traffic_bytes(cost, replicas)
            for cost in costs
        )
        for costs in held
    )
    gathered = max(sum(weight_traffic_bytes(cost, replicas) for cost in costs) for costs in held)
    step = compute + exposed + replica_seconds(cluster, replicas, gathered)
    memory = max(state + peak for state, peak in zip(states, built.peaks, strict=True))
    rate_of_images = microbatch * microbatches * replicas / step
    busy = sum(timeline.busy) / stages / first * microbatches
    flops = model_cost(model).whole.training_flops
    return Plan(
        kind="pipeline" if stages > 1 else "data_parallel",
        overlap="none" if reduction == "coalesced" else "overlapped",
        weights="autocast",
        weight_gather="fp32",
        recompute="none",
        stages=stages,
        replicas=replicas,
        microbatch=microbatch,
        microbatches=microbatches,
        schedule=schedule,
        placement=placement,
        reduction=reduction,
        layout=format_layout(layout, model),
        step_seconds=step,
        compute_seconds=compute,
        images_per_second=rate_of_images,
        mfu=mfu(flops, rate_of_images / cluster.num_gpus, cluster.gpu),
        idle_fraction=1 - busy / compute,
        reduction_seconds=replica_seconds(cluster, replicas, reduction_bytes, reductions + 1),
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


def _latency(
    cluster: Cluster, pipeline: Pipeline, replicas: int, source: int, target: int
) -> float:
    nodes = {_node(cluster, pipeline, replicas, stage) for stage in (source, target)}
    return cluster.latency_seconds if len(nodes) == 2 else 0.0


def _cards(
    cluster: Cluster, pipeline: Pipeline, replicas: int, source: int, target: int
) -> tuple[str, ...]:
    """The ways out of one node and into another that a message takes."""
    nodes = [_node(cluster, pipeline, replicas, stage) for stage in (source, target)]
    return () if nodes[0] == nodes[1] else (f"out of node {nodes[0]}", f"into node {nodes[1]}")


def _boundary_bytes(model: ModelConfig, layout: Layout, pipeline: Pipeline, microbatch: int) -> int:
    """Sent by the busiest rank for one micro-batch."""
    sent = [0] * pipeline.num_ranks
    for message in transfers_of(model, layout, microbatch):
        rank = pipeline.rank_of(message.source)
        if rank != pipeline.rank_of(message.target):
            sent[rank] += message.num_bytes
    return max(sent)
