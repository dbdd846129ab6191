"""Whether a schedule ends where a channel holds only so many messages that nobody has taken up."""

from __future__ import annotations

from collections import Counter

from deepmim_scale.pipeline.ir import Message, Schedule


def ends_with_capacity(schedule: Schedule, capacity: int) -> bool:
    """Replay with sends that block behind `capacity` messages whose receives are not yet posted.

    A GPU has few hardware queues (8 by default). Where computations share one with a channel, a
    second send behind one that nobody takes up holds up all that was queued after it: capacity 1.
    """
    position = [0] * len(schedule.ranks)
    sent: set[Message] = set()
    posted: set[Message] = set()
    under_way: Counter[object] = Counter()
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(schedule.ranks):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                channel = step.message[:3]
                if step.kind == "send":
                    taken = step.message in posted
                    if not taken and under_way[channel] >= capacity:
                        break
                    sent.add(step.message)
                    under_way[channel] += not taken
                elif step.kind == "receive":
                    posted.add(step.message)
                    under_way[channel] -= step.message in sent
                elif step.kind == "wait" and step.message not in sent:
                    break
                position[rank] += 1
                moved = True
    return all(at == len(steps) for at, steps in zip(position, schedule.ranks, strict=True))
