"""Channels of a schedule: none is shared by two pairs of ranks or two directions."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from deepmim_scale.config import ConfigError
from deepmim_scale.parallel.p2p import channels_of
from deepmim_scale.plan.schedule import Schedule
from deepmim_scale.plan.training import training_plan
from deepmim_scale.presets import load_preset

WAYS = [
    (preset, stages, schedule, placement)
    for preset, stages, schedule, placement in product(
        ("debug", "debug_mirl"), (2, 3, 6), ("gpipe", "1f1b", "dib", "dib_w"), ("linear", "v")
    )
    if preset == "debug_mirl" or placement == "linear"
]


def schedule_of(preset: str, stages: int, schedule: str, placement: str) -> Schedule:
    config = load_preset(preset).model_copy(
        update={"stages": stages, "schedule": schedule, "placement": placement}
    )
    try:
        return training_plan(config, 4).built.schedule
    except ConfigError:
        pytest.skip("no legal combination")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_a_channel_carries_its_messages_in_one_order(way: tuple[str, int, str, str]) -> None:
    schedule = schedule_of(*way)
    rank_of = schedule.pipeline.rank_of
    orders: dict[str, dict[tuple, list]] = {"send": {}, "receive": {}}
    for rank in schedule.ranks:
        for step in rank:
            if step.payload is not None:
                payload, source, target, _ = step.message
                channel = payload, rank_of(source), rank_of(target)
                orders[step.kind].setdefault(channel, []).append(step.message)
    assert orders["send"] == orders["receive"]
    assert channels_of(schedule) == sorted(orders["send"])


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_linear_neighbours_have_a_channel_per_direction(stages: int) -> None:
    found = channels_of(schedule_of("debug", stages, "dib", "linear"))
    pairs = list(pairwise(range(stages)))
    down = [("activation", a, b) for a, b in pairs]
    assert found == down + [("gradient", b, a) for a, b in pairs]
