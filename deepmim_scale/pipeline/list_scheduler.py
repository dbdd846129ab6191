"""List scheduling: builds an order by always starting the most urgent instruction that is ready."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from deepmim_scale.pipeline.ir import (
    Durations,
    Instruction,
    Kind,
    Pipeline,
    Style,
    dependencies,
    stage_kinds,
)

Work = tuple[Kind, int]
"""What a stage does to every micro-batch: kind and stage."""


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
    times: Durations,
    policy: Policy,
    style: Style,
) -> list[list[Instruction]]:
    """Order of the compute instructions on each rank under one policy.

    Each stage takes the micro-batches of a kind in their order, so sums of gradients do not depend
    on the policy. Ties go to the older micro-batch, then to the deeper stage.
    """
    # A small number is urgent.
    urgency = {kind: index for index, kind in enumerate(policy.priority)}
    queues: list[list[Work]] = [
        [
            (kind, stage)
            for stage in pipeline.stages_of(rank)
            for kind in stage_kinds(pipeline, stage, style)
        ]
        for rank in range(pipeline.num_ranks)
    ]
    # The same for every micro-batch: what a kind relies on, its seconds, and those of its messages.
    sources: dict[Work, list[Work]] = {}
    durations: dict[Work, float] = {}
    messages: dict[Work, dict[Work, tuple[float, tuple[object, ...]]]] = {}
    for kind, stage in (work for queue in queues for work in queue):
        step = Instruction(kind, stage, 0)
        sources[kind, stage] = []
        durations[kind, stage] = times.of(step)
        for source, payload in dependencies(pipeline, step, style):
            work = (source.kind, source.stage)
            sources[kind, stage].append(work)
            if payload and pipeline.rank_of(source.stage) != pipeline.rank_of(stage):
                seconds = times.transfer.get((payload, source.stage), 0.0)
                shared = times.lanes.get((payload, source.stage), ())
                ways = ((payload, source.stage, stage), *shared)
                messages.setdefault(work, {})[kind, stage] = seconds, ways
    # When a message has come; those that share a channel or a card follow one another.
    lane_free: dict[object, float] = {}
    arrivals: dict[tuple[Work, Work], list[float]] = {
        (source, target): [] for source, targets in messages.items() for target in targets
    }
    limits = _limits(policy, style, list(sources))
    ends: dict[Work, list[float]] = {work: [] for work in sources}
    free = [0.0] * pipeline.num_ranks
    orders: list[list[Instruction]] = [[] for _ in range(pipeline.num_ranks)]
    moments = [0.0]

    def candidates(rank: int) -> list[tuple[float, tuple[int, int, int], Work]]:
        """(ready time, urgency, work) of what may run next, ready or soon to be."""
        found = []
        for work in queues[rank]:
            # Micro-batches come in order, so the next one is the number that is done.
            microbatch = len(ends[work])
            if microbatch == num_microbatches:
                continue
            # A limit holds back what takes memory until the oldest user of it has released it.
            if work in limits:
                release, limit = limits[work]
                if microbatch - len(ends[release]) >= limit:
                    continue
            ready = 0.0
            for source in sources[work]:
                # Not even begun: its end, and so this work's start, is not known yet.
                if len(ends[source]) <= microbatch:
                    break
                moment = arrivals.get((source, work), ends[source])[microbatch]
                ready = max(ready, moment)
            else:
                found.append((ready, (urgency[work[0]], microbatch, -work[1]), work))
        return found

    remaining = num_microbatches * len(sources)
    while remaining:
        # Time jumps to the next moment at which anything can change.
        now = heapq.heappop(moments)
        while moments and moments[0] <= now:
            heapq.heappop(moments)
        for rank in range(pipeline.num_ranks):
            if free[rank] > now:
                continue
            found = candidates(rank)
            ready = [entry for entry in found if entry[0] <= now]
            # What becomes ready later must be looked at then, even if no rank gets free.
            for moment, _, _ in found:
                if moment > now:
                    heapq.heappush(moments, moment)
            if not ready:
                continue
            _, key, work = min(ready, key=lambda entry: entry[1])
            # Filling work of low urgency can delay what other ranks wait for: a patient policy
            # leaves the rank idle if something more urgent comes soon.
            horizon = now + policy.patience * durations[work]
            if any(now < entry[0] < horizon and entry[1][0] < key[0] for entry in found):
                continue
            free[rank] = now + durations[work]
            orders[rank].append(Instruction(*work, microbatch=len(ends[work])))
            ends[work].append(free[rank])
            for target, (seconds, lanes) in messages.get(work, {}).items():
                before = [lane_free.get(lane, 0.0) for lane in lanes]
                arrived = max([free[rank], *before]) + seconds
                lane_free |= dict.fromkeys(lanes, arrived)
                arrivals[work, target].append(arrived)
                heapq.heappush(moments, arrived)
            remaining -= 1
            heapq.heappush(moments, free[rank])
        assert moments or not remaining, f"no instruction is ready under {policy}"
    return orders


def _limits(policy: Policy, style: Style, works: list[Work]) -> dict[Work, tuple[Work, int]]:
    """For work that takes memory: the work that releases it, and how many may be open."""
    encoder: Kind = "encoder_weight_gradient" if style.split_backward else "encoder_backward"
    decoder: Kind = "decoder_weight_gradient" if style.split_backward else "decoder_backward"
    limits: dict[Work, tuple[Work, int]] = {}
    for kind, stage in works:
        if kind == "forward":
            limits[kind, stage] = (encoder, stage), policy.in_flight[stage]
        elif kind == "decoder_forward" or (kind == "decoder" and style.split_backward):
            limits[kind, stage] = (decoder, stage), policy.open_decoders
    return limits
