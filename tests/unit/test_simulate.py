"""Simulated schedules against closed forms and against the published-style table of notes."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest

from deepmim_scale.pipeline import builders
from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem
from deepmim_scale.pipeline.ir import (
    Durations,
    Instruction,
    Kind,
    Payload,
    Pipeline,
    Reduction,
    Style,
    insert_messages,
    stage_kinds,
)
from deepmim_scale.pipeline.list_scheduler import list_order
from deepmim_scale.pipeline.passes import insert_reductions, post_receives
from deepmim_scale.pipeline.registry import build_schedule
from deepmim_scale.pipeline.simulate import Memory, Timeline, peak_activation_bytes, simulate
from deepmim_scale.pipeline.validate import validate
from deepmim_scale.plan import cost as costs
from deepmim_scale.presets import load_preset

# Depth, taps; stages; micro-batches; idle % of 1f1b, zb_h1, dib, dib_w; speed-up of dib and dib_w.
# From a search over interruptible decoders with backward = 2 forwards, no transfer times.
STUDY = [
    (12, 4, 4, 4, 42.7, 20.6, 17.4, 6.3, 1.44, 1.64),
    (12, 4, 4, 8, 27.6, 12.0, 9.3, 4.2, 1.25, 1.32),
    (12, 4, 4, 16, 16.5, 7.1, 4.7, 1.9, 1.14, 1.17),
    (12, 4, 4, 32, 9.6, 4.4, 2.1, 1.5, 1.08, 1.09),
    (24, 4, 4, 8, 27.5, 11.8, 14.0, 6.6, 1.19, 1.29),
    (48, 4, 4, 4, 42.8, 20.3, 31.4, 13.1, 1.20, 1.52),
    (48, 4, 4, 8, 27.4, 11.6, 18.5, 6.9, 1.12, 1.28),
    (48, 4, 4, 16, 16.2, 6.5, 10.1, 3.9, 1.07, 1.15),
    (48, 4, 4, 32, 9.1, 3.8, 5.2, 1.6, 1.04, 1.08),
    (48, 8, 8, 4, 63.6, 48.0, 43.5, 25.8, 1.55, 2.04),
    (48, 8, 8, 8, 46.6, 23.1, 27.7, 17.8, 1.35, 1.54),
    (48, 8, 8, 16, 30.7, 13.6, 16.0, 9.8, 1.21, 1.30),
    (48, 8, 8, 32, 18.6, 7.9, 8.6, 5.1, 1.12, 1.17),
]


def times(forward: Sequence[float], decoder: Sequence[float], split: bool) -> Durations:
    """A gradient with respect to inputs or to weights takes as long as the forward."""
    backward = 1 if split else 2
    compute: dict[tuple[Kind, int], float] = {}
    for stage, (f, d) in enumerate(zip(forward, decoder, strict=True)):
        compute |= {
            ("forward", stage): f,
            ("encoder_backward", stage): backward * f,
            ("encoder_weight_gradient", stage): f,
            ("decoder_forward", stage): d,
            ("decoder_backward", stage): backward * d,
            ("decoder", stage): (1 + backward) * d,
            ("decoder_weight_gradient", stage): d,
        }
    return Durations(compute, {})


def built(
    name: str,
    forward: Sequence[float],
    decoder: Sequence[float],
    num_microbatches: int,
    memory: Sequence[Memory] | None = None,
) -> BuiltSchedule:
    split = name in ("zb_h1", "dib_w")
    pipeline = Pipeline(len(forward), tuple(d > 0 for d in decoder))
    memory = memory or [Memory(1, 1, 1)] * len(forward)
    return build_schedule(
        name, SchedulingProblem(pipeline, num_microbatches, times(forward, decoder, split), memory)
    )


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (4, 4), (4, 8), (8, 16), (5, 7)])
@pytest.mark.parametrize("decoder", [0.0, 2.0])
def test_closed_forms(p: int, m: int, decoder: float) -> None:
    idle = {
        name: built(name, [1.0] * p, [decoder] * p, m).timeline.idle_fraction
        for name in ("1f1b", "gpipe", "zb_h1")
    }
    assert idle["1f1b"] == pytest.approx((p - 1) / (m + p - 1))
    assert idle["gpipe"] == pytest.approx((p - 1) / (m + p - 1))
    assert idle["zb_h1"] == pytest.approx((p - 1) / (3 * m + p - 1))


def study_stage(depth: int, stages: int, index: int) -> tuple[float, float]:
    """Forward GFLOP of encoder and decoder; the patch embedding trains in 2 of 3 parts."""
    config = load_preset("deepmim_vit_b_48").model
    config = config.replace(masked_query=False)
    block = costs.encoder_block_cost(config).forward_flops / 1e9
    patch = costs.embedding_cost(config).forward_flops * 2 / 3 / 1e9
    encoder = depth // stages * block + (patch if index == 0 else 0)
    return encoder, costs.decoder_cost(config, 0).forward_flops / 1e9


def study_stages(depth: int, stages: int) -> tuple[list[float], list[float]]:
    """Forward GFLOP of every stage's encoder, and of its decoder."""
    each = [study_stage(depth, stages, index) for index in range(stages)]
    return [encoder for encoder, _ in each], [decoder for _, decoder in each]


@pytest.mark.parametrize("row", STUDY, ids=str)
def test_study(row: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    depth, _, p, m, *expected = row
    forward, decoder = study_stages(depth, p)
    found = {n: built(n, forward, decoder, m) for n in ("1f1b", "zb_h1", "dib", "dib_w")}
    base = found["1f1b"].timeline.makespan
    idle = [100 * found[name].timeline.idle_fraction for name in found]
    speedup = [base / found[name].timeline.makespan for name in ("dib", "dib_w")]
    with capsys.disabled():
        print(
            f"\n  B/{depth} p={p} M={m} idle % {[round(x, 1) for x in idle]} "
            f"speed-up {[round(x, 2) for x in speedup]}",
            end="",
        )
    assert idle[:2] == pytest.approx(expected[:2], abs=0.06)
    assert (1 - idle[2] / 100) >= 0.97 * (1 - expected[2] / 100)
    assert (1 - idle[3] / 100) >= 0.97 * (1 - expected[3] / 100)
    assert speedup[0] >= 0.97 * expected[4]
    assert speedup[1] >= 0.97 * expected[5]


def test_dib_uses_less_memory_than_1f1b() -> None:
    """ViT-B/12 with a decoder on each of 4 stages, MB per image, all in 16 bits as in the table."""
    config = load_preset("deepmim_vit_b_12").model.replace(masked_query=False)
    encoder = 3 * 2 * costs.encoder_block_cost(config).saved_values
    decoder = 2 * costs.decoder_cost(config, 0).saved_values
    memory = [Memory(encoder, decoder, decoder)] * 4
    peaks = {}
    for name in ("1f1b", "dib", "dib_w"):
        peaks[name] = max(built(name, *study_stages(12, 4), 8, memory).peaks) / 1e6
    assert peaks["1f1b"] == pytest.approx(70, rel=0.03)
    assert peaks["dib"] <= 28
    assert peaks["dib_w"] <= 28 * 1.03


def test_peak_by_hand() -> None:
    """Fused decoders count one at a time; 1f1b holds p micro-batches on the first stage."""
    memory = [Memory(10, 6, 4)] * 2
    assert built("1f1b", [1, 1], [1, 1], 4, memory).peaks == (32, 16)
    schedule = built("dib", [1], [1], 4, memory[:1]).schedule
    assert schedule.style.fused_decoders
    assert peak_activation_bytes(schedule, memory[:1]) == (14,)


def test_transfer_times_by_hand() -> None:
    """One micro-batch, two stages: forward, activation, forward, backward, gradient, backward."""
    schedule = built("dib", [1.0, 1.0], [0.0, 0.0], 1).schedule
    timeline = simulate(
        schedule,
        Durations(
            times([1.0, 1.0], [0.0, 0.0], False).compute,
            {("activation", 0): 0.5, ("gradient", 1): 0.25},
        ),
    )
    assert timeline.makespan == 1 + 0.5 + 1 + 2 + 0.25 + 2
    assert timeline.busy == (3, 3)
    assert timeline.idle == pytest.approx((1 - 3 / 6.75,) * 2)


TRANSFERS: dict[tuple[Payload | None, int | None], float] = {
    ("activation", 0): 0.5,
    ("gradient", 1): 0.25,
}


def waits_of(ahead: int) -> tuple[list[tuple[float, float]], Timeline]:
    """Waits of 2 micro-batches of gpipe on stages of 1 and 3 seconds per forward."""
    schedule = post_receives(built("gpipe", [1.0, 3.0], [0.0, 0.0], 2).schedule, ahead)
    compute = times([1.0, 3.0], [0.0, 0.0], False).compute
    timeline = simulate(schedule, Durations(compute, TRANSFERS))
    found = [
        (e.start, e.end)
        for rank in (1, 0)
        for e in timeline.events
        if e.rank == rank and e.instruction.kind == "wait"
    ]
    return found, timeline


def test_a_receive_that_is_posted_late_hides_nothing() -> None:
    """By hand: the receiver waits for whole transfers, as NCCL does for a receive queued late."""
    waits, timeline = waits_of(0)
    # Stage 1: receive from 1 to 1.5, forward to 4.5; the second activation, sent at 2, to 5.
    assert waits[:2] == [(0.0, 1.5), (4.5, 5.0)]
    # Two backwards of 6 until 20; gradients taken up at 14 and, after a backward of 2, at 20.
    assert waits[2:] == [(2.0, 14.25), (16.25, 20.25)]
    assert timeline.makespan == 22.25
    assert timeline.receiving == (0.5, 1.0)


def test_a_receive_that_is_posted_ahead_lies_beside_computation() -> None:
    """By hand: the second activation comes during the first forward of stage 1."""
    waits, timeline = waits_of(1)
    assert waits[:2] == [(0.0, 1.5), (4.5, 4.5)]
    assert timeline.receiving[1] == 0.5


def test_messages_share_a_card() -> None:
    """Two channels with one lane: the second transfer waits for the first."""
    schedule = built("dib", [1.0] * 3, [0.0] * 3, 4).schedule
    compute = times([1.0] * 3, [0.0] * 3, False).compute
    transfer = dict.fromkeys(product(("activation", "gradient"), range(3)), 3.0)
    apart = simulate(schedule, Durations(compute, transfer))
    # Stage 1 sends both ways.
    lanes = {("activation", 1): ("out of 1",), ("gradient", 1): ("out of 1",)}
    together = simulate(schedule, Durations(compute, transfer, lanes))
    assert sum(together.receiving) > sum(apart.receiving)


def reduced(reduction: Reduction, pieces: int, split: bool = False) -> Timeline:
    """One stage: forward 1, decoder 4, encoder backward 2; sums of 1 (decoders) and 2 (encoder)."""
    style = Style(fused_decoders=True, split_backward=split)
    steps = list(map(partial(Instruction, stage=0, microbatch=0), stage_kinds(ONE, 0, style)))
    schedule = insert_messages("alone", ONE, 1, [steps], style)
    schedule = insert_reductions(schedule, reduction)
    validate(schedule)
    compute: dict[tuple[Kind, int], float] = {
        ("forward", 0): 1.0,
        ("decoder", 0): 4.0,
        ("encoder_backward", 0): 2.0,
        ("reduce_decoders", 0): 1.0,
        ("reduce_encoder", 0): 2.0,
    }
    return simulate(schedule, Durations(compute, {}, {}, {("reduce_encoder", 0): pieces}))


ONE = Pipeline(1, (True,))


def test_sums_lie_beside_computation() -> None:
    """By hand, 7 seconds of computation: what nothing covers is waited for at the end."""
    assert reduced("coalesced", 1).reducing == (3.0,)
    # The decoders' sum lies beside the encoder's backward pass, the encoder's comes after it.
    assert reduced("overlapped", 1).reducing == (2.0,)
    # In two pieces: the first from 6 to 7 while the second is computed, the second from 7 to 8.
    assert reduced("overlapped", 2).reducing == (1.0,)
    # More pieces gain nothing: from 5 on there is always something to sum.
    assert reduced("overlapped", 4).reducing == (1.0,)
    # Queued weight gradients are made in one go, so their sum begins after it.
    assert reduced("overlapped", 4, split=True).reducing == (2.0,)
    assert reduced("overlapped", 4).makespan == 8.0


def test_search_knows_of_transfers() -> None:
    """It gives a rank that can receive or compute what the simulation then does at once."""
    compute = times([1.0] * 3, [1.5] * 3, False).compute
    payloads: tuple[Payload, ...] = ("activation", "gradient")
    transfer = {(p, s): 0.4 for p in payloads for s in range(3)}
    pipeline, memory = Pipeline(3, (True,) * 3), [Memory(1, 1, 1)] * 3
    slow = build_schedule(
        "dib", SchedulingProblem(pipeline, 6, Durations(compute, transfer), memory)
    )
    blind = build_schedule("dib", SchedulingProblem(pipeline, 6, Durations(compute, {}), memory))
    late = simulate(blind.schedule, Durations(compute, transfer))
    assert blind.timeline.makespan < slow.timeline.makespan <= late.makespan
    # Of 6 messages each way all but those that fill the pipe lie beside computations.
    assert max(slow.timeline.receiving) < 0.25 * 12 * 0.4


@pytest.mark.parametrize("name", ["dib", "dib_w"])
def test_many_microbatches_are_planned_quickly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 4 per rank one policy is carried out, as good as the search over all of them."""
    counts: list[int] = []

    def counted(pipeline: Pipeline, count: int, *rest: Any) -> list[list[Instruction]]:
        counts.append(count)
        return list_order(pipeline, count, *rest)

    monkeypatch.setattr(builders, "list_order", counted)
    stages = study_stages(12, 4)
    quick = built(name, *stages, 40)
    assert max(counts) == 40
    assert counts.count(40) == 1
    assert counts.count(16) == len(counts) - 1
    monkeypatch.setattr(builders, "SEARCHED_MICROBATCHES", 10)
    best = built(name, *stages, 40)
    assert quick.timeline.makespan <= 1.01 * best.timeline.makespan
    assert max(quick.peaks) <= max(built("1f1b", *stages, 40).peaks)
