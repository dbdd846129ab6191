"""List scheduling: builds an order by always starting the most urgent instruction that is ready."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from deepmim_scale.plan.schedule import (
    Instruction,
    Kind,
    Pipeline,
    Style,
    Times,
    needs,
    stage_kinds,
)


@dataclass(frozen=True)
class Policy:
    """What a free rank prefers."""

    priority: tuple[Kind, ...]
    """Kinds, most urgent first."""
    in_flight: tuple[int, ...]
    """Per stage, micro-batches between forward and the release of the encoder's activations."""
    open_decoders: int
    """Per stage, micro-batches between a decoder's forward and the release of its activations."""
    patience: float = 0.0
    """Wait for a more urgent instruction that becomes ready within this share of a duration."""


def list_order(
    pipeline: Pipeline,
    num_microbatches: int,
    times: Times,
    policy: Policy,
    style: Style,
) -> list[list[Instruction]]:
    """Order of the compute instructions on each rank under one policy.

    Each stage takes the micro-batches of a kind in their order, so sums of gradients do not depend
    on the policy. Ties go to the older micro-batch, then to the deeper stage.
    """
    rank_of = [pipeline.rank_of(stage) for stage in range(pipeline.num_stages)]
    urgency = {kind: index for index, kind in enumerate(policy.priority)}
    queues: list[list[tuple[Kind, int]]] = [[] for _ in range(pipeline.num_ranks)]
    for stage in range(pipeline.num_stages):
        queues[rank_of[stage]] += [(kind, stage) for kind in stage_kinds(pipeline, stage, style)]
    following = {(kind, stage): 0 for queue in queues for kind, stage in queue}
    opens: Kind = "decoder" if style.fused else "decoder_forward"
    closes: dict[Kind, Kind] = {
        "forward": "encoder_weight_gradient" if style.split else "encoder_backward",
        opens: "decoder_weight_gradient" if style.split else "decoder_backward",
    }
    if style.fused and not style.split:
        del closes[opens]  # opens and closes within one instruction
    limits = {
        (kind, stage): policy.in_flight[stage] if kind == "forward" else policy.open_decoders
        for kind, stage in following
        if kind in closes
    }

    ends: dict[Instruction, float] = {}
    free = [0.0] * pipeline.num_ranks
    orders: list[list[Instruction]] = [[] for _ in range(pipeline.num_ranks)]
    moments = [0.0]
    waiting: dict[tuple[Kind, int], tuple[int, list[tuple[Instruction, float]]]] = {}

    def requirements(kind: Kind, stage: int) -> list[tuple[Instruction, float]]:
        """Of the next micro-batch, each with the time that its message takes."""
        microbatch = following[kind, stage]
        known = waiting.get((kind, stage))
        if known is None or known[0] != microbatch:
            found = [
                (source, times.transfer.get((payload, source.stage), 0.0)
                 if payload and rank_of[source.stage] != rank_of[stage] else 0.0)
                for source, payload in needs(pipeline, Instruction(kind, stage, microbatch), style)
            ]  # fmt: skip
            waiting[kind, stage] = known = (microbatch, found)
        return known[1]

    def candidates(rank: int) -> list[tuple[float, tuple[int, int, int], Instruction]]:
        """(ready time, urgency, instruction) of what may run next, ready or soon to be."""
        found = []
        for kind, stage in queues[rank]:
            microbatch = following[kind, stage]
            if microbatch == num_microbatches:
                continue
            limit = limits.get((kind, stage))
            if limit is not None and microbatch - following[closes[kind], stage] >= limit:
                continue
            ready = 0.0
            for source, seconds in requirements(kind, stage):
                if source not in ends:
                    break
                ready = max(ready, ends[source] + seconds)
            else:
                key = (urgency[kind], microbatch, -stage)
                found.append((ready, key, Instruction(kind, stage, microbatch)))
        return found

    total = num_microbatches * len(following)
    while len(ends) < total:
        now = heapq.heappop(moments)
        while moments and moments[0] <= now:
            heapq.heappop(moments)
        for rank in range(pipeline.num_ranks):
            if free[rank] > now:
                continue
            found = candidates(rank)
            ready = [entry for entry in found if entry[0] <= now]
            for moment, _, _ in found:
                if moment > now:
                    heapq.heappush(moments, moment)
            if not ready:
                continue
            _, key, step = min(ready, key=lambda entry: entry[1])
            horizon = now + policy.patience * times.of(step)
            if any(now < entry[0] < horizon and entry[1][0] < key[0] for entry in found):
                continue
            ends[step] = free[rank] = now + times.of(step)
            following[step.kind, step.stage] += 1
            orders[rank].append(step)
            heapq.heappush(moments, free[rank])
        assert moments or len(ends) == total, f"no instruction is ready under {policy}"
    return orders
