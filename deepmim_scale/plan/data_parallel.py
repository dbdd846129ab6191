"""Data parallelism and ZeRO-3 by formula: what pipelines are compared with.

Ideally overlapped, a step takes the larger of its computation and its communication. No user of
DDP, ZeRO-2 or FSDP2 gets more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import get_args

from deepmim_scale.config import ModelConfig
from deepmim_scale.pipeline.registry import DEFAULT
from deepmim_scale.plan.cost import (
    Recompute,
    WeightGather,
    gradient_traffic_bytes,
    local_activation_bytes,
    model_cost,
    recomputed_flops,
    state_bytes,
    weight_traffic_bytes,
)
from deepmim_scale.plan.hardware import mfu
from deepmim_scale.plan.partition import format_layout, stages_at
from deepmim_scale.plan.row import (
    Cluster,
    Kind,
    Overlap,
    Plan,
    Weights,
    flops_rate,
    replica_seconds,
    usable_bytes,
)


def data_parallel_rows(
    model: ModelConfig, cluster: Cluster, microbatch: int, microbatches: int
) -> Iterator[Plan]:
    """Data parallelism and ZeRO-3, overlapped or not, with every choice that saves memory."""
    kinds: tuple[Kind, ...] = ("data_parallel", "zero3")
    for kind, weights, recompute in product(kinds, get_args(Weights), get_args(Recompute)):
        gathers = get_args(WeightGather) if (kind, weights) == ("data_parallel", "autocast") else ()
        for gather, overlap in product(gathers or ("16bit",), get_args(Overlap)):
            yield data_parallel(
                model, cluster, microbatch, microbatches, kind, overlap, weights, gather, recompute
            )


def data_parallel(
    model: ModelConfig,
    cluster: Cluster,
    microbatch: int,
    microbatches: int,
    kind: Kind = "data_parallel",
    overlap: Overlap = "overlapped",
    weights: Weights = "autocast",
    gather: WeightGather = "fp32",
    recompute: Recompute = "none",
) -> Plan:
    """One stage on every GPU. ZeRO-3 gathers its 16-bit weights for each forward and backward."""
    cost, replicas = model_cost(model), cluster.num_gpus
    count = microbatch * microbatches
    flops = cost.executed.training_flops + recomputed_flops(model, recompute)
    # The teacher has no backward pass.
    flops -= cost.teacher.backward_flops
    if cluster.calibration is None:
        compute = count * flops / flops_rate(cluster, microbatch)
    else:
        again = 1 + recomputed_flops(model, recompute) / cost.executed.training_flops
        whole = cluster.calibration.whole(model, 0, model.depth, microbatch)
        compute = microbatches * whole * again
    sums = gradient_traffic_bytes(cost, replicas)
    gathers = 2 * microbatches if kind == "zero3" else 1
    gather = "16bit" if kind == "zero3" else gather
    sent = sums + gathers * weight_traffic_bytes(cost, replicas, gather)
    communication = replica_seconds(cluster, replicas, sent, 1 + gathers)
    hidden = overlap == "overlapped"
    step = max(compute, communication) if hidden else compute + communication
    activations = microbatch * local_activation_bytes(model, recompute, weights == "pure_16bit")
    state = state_bytes(cost, replicas, zero3=kind == "zero3", pure=weights == "pure_16bit")
    rate = count * replicas / step
    trained = cost.whole.training_flops
    return Plan(
        kind=kind,
        overlap=overlap,
        weights=weights,
        weight_gather=gather,
        recompute=recompute,
        stages=1,
        replicas=replicas,
        microbatch=microbatch,
        microbatches=microbatches,
        schedule=DEFAULT,
        placement="linear",
        reduction="overlapped" if hidden else "coalesced",
        layout=format_layout(stages_at(model, [model.depth]), model),
        step_seconds=step,
        compute_seconds=compute,
        images_per_second=rate,
        mfu=mfu(trained, rate / replicas, cluster.gpu),
        idle_fraction=0.0,
        reduction_seconds=communication,
        memory_bytes=state + activations,
        activation_bytes=activations,
        boundary_bytes=0,
        reduction_bytes=sent,
        fits=state + activations <= usable_bytes(cluster.gpu),
    )
