"""Passes over finished orders: receives posted ahead of their waits, and sums over replicas.

Both add or move what costs a rank no time of its own. The order of computations stays, and with it
every bit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from deepmim_scale.pipeline.ir import Instruction, Reduction, Schedule, last_gradients

Channel = tuple[object, int | None, int]
"""Payload, peer and stage, at the receiver."""


def post_receives(schedule: Schedule, ahead: int) -> Schedule:
    """Post each channel's receives `ahead` messages before they are waited for, 0: just before.

    The first ones are posted at the beginning of the step.
    """
    return replace(schedule, ranks=tuple(_posted(steps, ahead) for steps in schedule.ranks))


def _posted(steps: tuple[Instruction, ...], ahead: int) -> tuple[Instruction, ...]:
    waiting: dict[Channel, list[Instruction]] = defaultdict(list)
    for step in steps:
        if step.kind == "receive":
            waiting[step.payload, step.peer, step.stage].append(step)
    first = [step for receives in waiting.values() for step in receives[:ahead]]
    found = first
    next_one = dict.fromkeys(waiting, ahead)
    for step in steps:
        if step.kind == "receive":
            continue
        if step.kind != "wait":
            found.append(step)
            continue
        channel = (step.payload, step.peer, step.stage)
        following = waiting[channel][next_one[channel] : next_one[channel] + 1]
        next_one[channel] += 1
        # With none ahead a wait has its own receive before it.
        found += [step, *following] if ahead else [*following, step]
    return tuple(found)


def insert_reductions(schedule: Schedule, reduction: Reduction) -> Schedule:
    """Say where gradients are summed over the replicas.

    overlapped: each part of a stage in its last micro-batch. coalesced: all at the end.
    per_microbatch: each part in every micro-batch.
    """
    sums = {done: kind for kind, done in last_gradients(schedule.style).items()}
    last = schedule.num_microbatches - 1
    ranks = []
    for steps in schedule.ranks:
        found: list[Instruction] = []
        late: list[Instruction] = []
        for step in steps[:-1]:
            due = step.microbatch == last or reduction == "per_microbatch"
            sum_of = [replace(step, kind=sums[step.kind])] if due and step.kind in sums else []
            if reduction == "coalesced":
                late += sum_of
                sum_of = []
            # Queued weight gradients all appear at their end; autograd makes them one by one.
            found += [step, *sum_of] if schedule.style.split_backward else [*sum_of, step]
        ranks.append((*found, *late, steps[-1]))
    return replace(schedule, ranks=tuple(ranks))
