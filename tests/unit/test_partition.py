"""The exact cut against brute force and against DeepSpeed's; layout strings there and back."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.compatibility import check_combination
from deepmim_scale.plan.cost import stage_cost
from deepmim_scale.plan.partition import (
    Layout,
    format_layout,
    minimax_cuts,
    parse_layout,
    partition,
    stages_at,
)
from deepmim_scale.presets import load_preset

ROWS = pytest.mark.parametrize("depth", range(1, 17))


def flops(config: ModelConfig, stages: Layout) -> int:
    return max(stage_cost(config, s.first, s.last).whole.training_flops for s in stages)


def model(depth: int, taps: tuple[int, ...]) -> ModelConfig:
    return ModelConfig(depth=depth, taps=taps)


def tap_sets(depth: int) -> set[tuple[int, ...]]:
    """Even, published-like (late) and single decoders."""
    late = tuple(sorted({max(1, depth - back) for back in (6, 4, 2, 0)}))
    return {ModelConfig(depth=depth, taps=(-min(4, depth),)).taps, late, (depth,)}


@ROWS
def test_equals_brute_force(depth: int) -> None:
    for taps, num_stages in itertools.product(tap_sets(depth), range(1, min(4, depth) + 1)):
        config = model(depth, taps)
        cuts = itertools.combinations(range(1, depth), num_stages - 1)
        best = min(flops(config, stages_at(config, [*cut, depth])) for cut in cuts)
        found = flops(config, partition(config, num_stages))
        assert found == best, (depth, taps, num_stages, found / best)


@ROWS
def test_never_worse_than_deepspeed_on_parameters(depth: int) -> None:
    utils = pytest.importorskip("deepspeed.runtime.utils")
    for taps, num_stages in itertools.product(tap_sets(depth), range(1, min(4, depth) + 1)):
        config = model(depth, taps)
        weights = [stage_cost(config, b, b + 1).whole.trainable for b in range(depth)]
        cuts = utils.partition_balanced(weights, num_stages)[1:]
        if len({0, *cuts}) <= num_stages:
            continue  # DeepSpeed leaves a stage empty
        theirs = flops(config, stages_at(config, cuts))
        assert flops(config, partition(config, num_stages)) <= theirs, (depth, taps, num_stages)


def test_gain_over_parameters_on_published_taps() -> None:
    """Max-stage FLOPs of taps 6, 8, 10, 12 on 4 stages: uniform cut and ours."""
    config = load_preset("deepmim_vit_b_12").model.replace(masked_query=False)
    ours = partition(config, 4)
    assert format_layout(ours, config) == "6d/2d/2d/2d"
    uniform = flops(config, stages_at(config, [3, 6, 9, 12]))
    assert uniform / flops(config, ours) >= 1.3


def test_stages_without_a_decoder() -> None:
    config = load_preset("deepmim_vit_b_48").model.replace(masked_query=False)
    layout = partition(config, 8)
    total = stage_cost(config, 0, 48).whole.training_flops
    assert sum(bool(stage.decoders) for stage in layout) == 4
    assert total / 8 / flops(config, layout) == pytest.approx(0.96, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    num_stages=st.integers(1, 4),
    limit=st.integers(20, 120),
)
def test_memory_cap(costs: list[int], num_stages: int, limit: int) -> None:
    """Earlier stages hold more micro-batches, so their blocks weigh more."""
    n = len(costs)

    def cost(first: int, last: int) -> int:
        return sum(costs[first:last])

    def fits(stage: int, first: int, last: int) -> bool:
        return (num_stages - stage) * (last - first) * 10 <= limit

    legal = [
        max(cost(a, b) for a, b in itertools.pairwise(ends))
        for cut in itertools.combinations(range(1, n), num_stages - 1)
        for ends in [(0, *cut, n)]
        if num_stages <= n and all(fits(s, *e) for s, e in enumerate(itertools.pairwise(ends)))
    ]
    cuts = minimax_cuts(n, num_stages, cost, fits) if num_stages <= n else None
    if cuts is None:
        assert not legal
    else:
        ends = (0, *cuts)
        assert max(cost(a, b) for a, b in itertools.pairwise(ends)) == min(legal)
        assert all(fits(s, *e) for s, e in enumerate(itertools.pairwise(ends)))


def test_no_layout_fits() -> None:
    config = load_preset("debug").model
    with pytest.raises(UserError, match=r"stages=2: no cut of 12 blocks fits 1\.0 GiB; use"):
        partition(config, 2, lambda stage, cost: 2**31, 2**30)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_layout_there_and_back(data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 12))
    taps = sorted(data.draw(st.sets(st.integers(1, depth), max_size=4)) | {depth})
    cuts = sorted(data.draw(st.sets(st.integers(1, depth), max_size=3)) | {depth})
    config = model(depth, tuple(taps))
    layout = stages_at(config, cuts)
    assert parse_layout(format_layout(layout, config), config) == layout


def test_layout_examples() -> None:
    config = model(12, (6, 8, 10, 12))
    assert [s.decoders for s in parse_layout("6d2d/2d2d", config)] == [(0, 1), (2, 3)]
    assert [s.decoders for s in parse_layout("3|3d|2d2d2d", config)] == [(), (0,), (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6d|2d|2d", r"adds up to 10 blocks in 3 stages; must be depth=12"),
        ("6d|2d|2d|2d|2d", r"adds up to 14 blocks"),
        ("6d||6d", r"'' is no stage; write numbers of blocks"),
        ("6d|2x", r"'2x' is no stage"),
        ("6dd|6d", r"'6dd' is no stage"),
        ("1" * 60 + "x", r"is no stage"),
        ("0|6d2d2d2d|0", r"at least one block in each stage"),
        (
            "3d|3d|6d",
            (
                r"decoders after blocks \[3, 6, 12\], but taps=\[6, 8, 10, 12\]; "
                r"write 3/3d/2d2d2d"
            ),
        ),
    ],
)
def test_bad_layouts(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_layout(text, model(12, (6, 8, 10, 12)))


def test_mirl_is_cut_into_segments() -> None:
    config = load_preset("mirl_vit_b_48").model
    assert format_layout(partition(config, 3), config) == "8d8d/8d8d/8d8d"
    with pytest.raises(UserError, match="equal runs of segments"):
        parse_layout("8d|8d8d8d|8d8d", config)


@pytest.mark.parametrize("method", ["mae", "deepmim", "mirl"])
@pytest.mark.parametrize("placement", ["linear", "v"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "dib", "dib_w", "zb_h1"])
@pytest.mark.parametrize("reduction", ["coalesced", "per_microbatch"])
def test_legal_table(method: str, placement: str, schedule: str, reduction: str) -> None:
    """Spelt out once more, against the table's data."""
    config = ModelConfig(method=method, depth=12)
    for num_stages in (1, 2, 3, 4, 6, 12, 13):
        if method == "mirl":
            legal = schedule in ("gpipe", "1f1b", "dib")
            legal &= num_stages in ((1, 3) if placement == "v" else (1, 2, 3, 6))
        else:
            legal = placement == "linear" and num_stages <= 12 and schedule != "zb_h1"
            legal &= schedule != "dib_w" or reduction == "coalesced"
        arguments = (config, num_stages, schedule, placement, reduction)
        if legal:
            check_combination(*arguments)
        else:
            with pytest.raises(UserError, match=r"^\w+=\w+: [^\n]*use "):
                check_combination(*arguments)


def test_local_gradient_flow() -> None:
    check_combination(load_preset("debug").model, 2, "dib", gradient_flow="local")
    with pytest.raises(UserError, match="gradient_flow=local: mirl"):
        check_combination(load_preset("debug_mirl").model, 2, "dib", gradient_flow="local")
