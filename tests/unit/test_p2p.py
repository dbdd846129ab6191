"""Channels of a schedule: none is shared by two pairs of ranks or two directions."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from functools import cache
from itertools import pairwise, product, starmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepmim_scale.errors import UserError
from deepmim_scale.parallel.p2p import Channel, channels_of, rounds_of
from deepmim_scale.pipeline.capacity import ends_with_capacity
from deepmim_scale.pipeline.ir import Message, Payload, Schedule
from deepmim_scale.pipeline.passes import post_receives
from deepmim_scale.plan.resolve import training_plan
from deepmim_scale.presets import load_preset

WAYS = [
    (preset, stages, schedule, placement)
    for preset, stages, schedule, placement in product(
        ("debug", "debug_mirl"), (2, 3, 6), ("gpipe", "1f1b", "dib", "dib_w"), ("linear", "v")
    )
    if preset == "debug_mirl" or placement == "linear"
]


@cache
def legal_schedule(
    preset: str, stages: int, schedule: str, placement: str, microbatches: int
) -> Schedule | None:
    config = load_preset(preset).replace(stages=stages, schedule=schedule, placement=placement)
    try:
        return training_plan(config, microbatches).built.schedule
    except UserError:
        return None


def schedule_of(
    preset: str, stages: int, schedule: str, placement: str = "linear", microbatches: int = 4
) -> Schedule:
    return legal_schedule(preset, stages, schedule, placement, microbatches) or pytest.skip(
        "no legal combination"
    )


def channel_of(schedule: Schedule, message: Message) -> Channel:
    payload, source, target, _ = message
    assert payload is not None, f"{message} carries nothing"
    assert source is not None, f"{message} has no source"
    assert target is not None, f"{message} has no target"
    rank_of = schedule.pipeline.rank_of
    return payload, rank_of(source), rank_of(target)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_a_channel_carries_its_messages_in_one_order(way: tuple[str, int, str, str]) -> None:
    schedule = schedule_of(*way)
    orders: dict[str, dict[Channel, list[Message]]] = {"send": {}, "receive": {}, "wait": {}}
    for rank in schedule.ranks:
        for step in rank:
            if step.payload is not None:
                channel = channel_of(schedule, step.message)
                orders[step.kind].setdefault(channel, []).append(step.message)
    assert orders["send"] == orders["receive"] == orders["wait"]
    assert channels_of(schedule) == sorted(orders["send"])


@given(
    ranks=st.integers(2, 9),
    pairs=st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30),
)
def test_rounds_of_channels(ranks: int, pairs: set[tuple[int, int]]) -> None:
    """Every channel once, no rank twice in a round: members then make one group each."""
    channels: list[Channel] = [
        ("activation", a % ranks, b % ranks) for a, b in sorted(pairs) if a % ranks != b % ranks
    ]
    rounds = rounds_of(channels)
    assert sorted(channel for some in rounds for channel in some) == sorted(channels)
    for some in rounds:
        ends = [end for channel in some for end in channel[1:]]
        assert len(ends) == len(set(ends))


def test_a_pipeline_needs_few_rounds() -> None:
    for stages in (2, 3, 6, 8, 12):
        preset = "deepmim_vit_b_48" if stages == 8 else "debug"
        assert len(rounds_of(channels_of(schedule_of(preset, stages, "dib")))) <= 4


Lane = Callable[[Payload, int, int], Hashable]


def finishes(schedule: Schedule, lane: Lane) -> bool:
    """Replay under NCCL's rules: on a communicator (`lane`) messages pass one by one at both ends,
    and one that both ends have reached passes; sends and receives let their rank go on, a wait
    does not."""
    queues: dict[tuple[int, Hashable], deque[tuple[Message, tuple[int, int]]]] = defaultdict(deque)
    left = [deque(rank) for rank in schedule.ranks]
    begun, passed = set(), set()
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(left):
            while steps:
                step = steps[0]
                if step.kind in ("send", "receive") and (rank, step) not in begun:
                    payload, source, target = channel_of(schedule, step.message)
                    way = lane(payload, source, target)
                    queues[rank, way].append((step.message, (source, target)))
                    begun.add((rank, step))
                    moved = True
                if step.kind == "wait" and step.message not in passed:
                    break
                steps.popleft()
                moved = True
        for (rank, way), queue in list(queues.items()):
            while queue and rank == queue[0][1][0]:
                message, (_, target) = queue[0]
                other = queues[target, way]
                if not other or other[0][0] != message:
                    break
                queue.popleft()
                other.popleft()
                passed.add(message)
                moved = True
    return not any(left)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_no_ring_of_waiting_ranks(way: tuple[str, int, str, str]) -> None:
    schedule = schedule_of(*way)
    assert finishes(schedule, lambda payload, source, target: (payload, source, target))


MANY = [
    (preset, stages, schedule, placement, microbatches)
    for preset, stages, schedule, placement, microbatches in product(
        ("deepmim_vit_b_12", "deepmim_vit_b_48", "mirl_vit_b_48"),
        (2, 3, 4, 8),
        ("gpipe", "1f1b", "dib", "dib_w"),
        ("linear", "v"),
        (4, 16),
    )
    if (preset.startswith("mirl") or placement == "linear")
    # All of MIRL's predictions cross before the first of them is used.
    and (preset, schedule) != ("mirl_vit_b_48", "gpipe")
]


@pytest.mark.parametrize("way", MANY, ids=lambda way: "-".join(map(str, way)))
def test_every_schedule_ends_where_a_channel_holds_one_message(
    way: tuple[str, int, str, str, int],
) -> None:
    assert ends_with_capacity(schedule_of(*way), 1)


def test_why_receives_are_posted_ahead() -> None:
    """Posted just before their waits, some schedules would need room for two messages."""
    late = [post_receives(schedule, 0) for schedule in starmap(legal_schedule, MANY) if schedule]
    assert not all(ends_with_capacity(schedule, 1) for schedule in late)


def test_why_a_communicator_is_not_shared_by_a_pipeline() -> None:
    """The default schedule of ViT-B/48 in eight stages would never end."""
    schedule = post_receives(schedule_of("deepmim_vit_b_48", 8, "dib", microbatches=8), 0)
    assert not finishes(schedule, lambda payload, source, target: (payload, source < target))
    assert finishes(schedule, lambda payload, source, target: (payload, source, target))


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_linear_neighbours_have_a_channel_per_direction(stages: int) -> None:
    found = channels_of(schedule_of("debug", stages, "dib", "linear"))
    pairs = list(pairwise(range(stages)))
    down = [("activation", a, b) for a, b in pairs]
    assert found == down + [("gradient", b, a) for a, b in pairs]
