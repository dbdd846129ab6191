"""Every generated schedule is legal, and the validator finds every kind of damage."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepmim_scale.methods.base import Placement
from deepmim_scale.pipeline.bound import least_makespan
from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem
from deepmim_scale.pipeline.files import instructions_to_json
from deepmim_scale.pipeline.ir import Durations, Instruction, Kind, Payload, Pipeline, Schedule
from deepmim_scale.pipeline.registry import build_schedule
from deepmim_scale.pipeline.simulate import Deadlock, Memory
from deepmim_scale.pipeline.validate import ScheduleError, validate

Steps = list[Instruction]
Edit = Callable[[Steps], object]

NAMES = ("gpipe", "1f1b", "dib", "dib_w", "zb_h1")


def times_of(num_stages: int, split: bool, seed: int = 3, transfer: float = 0.0) -> Durations:
    """Uneven but fixed durations."""
    backward = 1 if split else 2
    compute: dict[tuple[Kind, int], float] = {}
    for stage in range(num_stages):
        encoder, decoder = 1 + (seed * (stage + 1)) % 3, 1 + (seed + stage) % 4
        compute |= {
            ("forward", stage): encoder,
            ("decoder_forward", stage): decoder,
            ("decoder_backward", stage): backward * decoder,
            ("decoder", stage): (1 + backward) * decoder,
            ("encoder_backward", stage): backward * encoder,
            ("decoder_weight_gradient", stage): decoder,
            ("encoder_weight_gradient", stage): encoder,
        }
    payloads: tuple[Payload, ...] = ("activation", "gradient", "prediction", "prediction_gradient")
    return Durations(compute, {(p, s): transfer for p in payloads for s in range(num_stages)})


def make(
    name: str, pipeline: Pipeline, num_microbatches: int, seed: int = 3, transfer: float = 0.0
) -> BuiltSchedule:
    times = times_of(pipeline.num_stages, name in ("dib_w", "zb_h1"), seed, transfer)
    memory = [Memory(10, 8, 4)] * pipeline.num_stages
    return build_schedule(name, SchedulingProblem(pipeline, num_microbatches, times, memory))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    decoders=st.lists(st.booleans(), min_size=1, max_size=5),
    num_microbatches=st.integers(1, 6),
    seed=st.integers(0, 11),
    transfer=st.sampled_from([0.0, 0.3]),
    local=st.booleans(),
)
def test_linear_schedules_are_legal(
    name: str, decoders: list[bool], num_microbatches: int, seed: int, transfer: float, local: bool
) -> None:
    pipeline = Pipeline(len(decoders), tuple(decoders), local_gradients=local)
    made = make(name, pipeline, num_microbatches, seed, transfer)
    validate(made.schedule)
    times = times_of(len(decoders), made.schedule.style.split_backward, seed, transfer)
    least = least_makespan(pipeline, num_microbatches, times, made.schedule.style)
    assert least <= made.timeline.makespan * (1 + 1e-9), "no order ends below the bound"


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(("gpipe", "1f1b", "dib")),
    num_ranks=st.integers(1, 4),
    placement=st.sampled_from(("linear", "v")),
    num_microbatches=st.integers(1, 6),
    seed=st.integers(0, 11),
    transfer=st.sampled_from([0.0, 0.3]),
)
def test_pair_schedules_are_legal(
    name: str,
    num_ranks: int,
    placement: Placement,
    num_microbatches: int,
    seed: int,
    transfer: float,
) -> None:
    stages = num_ranks * (2 if placement == "v" else 1)
    pipeline = Pipeline(num_ranks, (True,) * stages, placement, paired=True)
    schedule = make(name, pipeline, num_microbatches, seed, transfer).schedule
    validate(schedule)
    crossing = {step.payload for rank in schedule.ranks for step in rank if step.payload}
    assert (placement == "v") <= ("prediction" not in crossing)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_accumulation_is_the_same(name: str) -> None:
    """Per stage, every kind that adds to a gradient takes micro-batches as 0, 1, 2, ..."""
    schedule = make(name, Pipeline(3, (True, False, True)), 5).schedule
    adding = (
        "decoder",
        "decoder_backward",
        "encoder_backward",
        "decoder_weight_gradient",
        "encoder_weight_gradient",
    )
    for rank, instructions in enumerate(schedule.ranks):
        for kind in adding:
            found = [step.microbatch for step in instructions if step.kind == kind]
            assert found in ([], [0, 1, 2, 3, 4]), (rank, kind, found)


def test_1f1b_is_the_textbook_order() -> None:
    schedule = make("1f1b", Pipeline(2, (False, False)), 3).schedule
    short = [
        "".join(f"{step.kind[0]}{step.microbatch} " for step in rank if step.payload is None)
        for rank in schedule.ranks
    ]
    assert short == ["f0 f1 e0 f2 e1 e2 f-1 ", "f0 e0 f1 e1 f2 e2 f-1 "]


def test_v_places_pairs_on_one_rank() -> None:
    pipeline = Pipeline(3, (True,) * 6, "v", paired=True)
    assert [pipeline.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert all(pipeline.rank_of(s) == pipeline.rank_of(pipeline.partner(s)) for s in range(6))


def damaged(schedule: Schedule, rank: int, edit: Edit) -> Schedule:
    instructions = list(schedule.ranks[rank])
    edit(instructions)
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(instructions)
    return replace(schedule, ranks=tuple(ranks))


def swap(first: Instruction, second: Instruction) -> Edit:
    def edit(steps: Steps) -> None:
        i, j = steps.index(first), steps.index(second)
        steps[i], steps[j] = steps[j], steps[i]

    return edit


FORWARD_1 = Instruction("forward", 1, 0)
RECEIVE_1 = Instruction("receive", 1, 0, "activation", 0)
ENCODER_SUM, DECODERS_SUM = (
    Instruction("reduce_encoder", 0, 1),
    Instruction("reduce_decoders", 0, 1),
)
WAIT_1 = replace(RECEIVE_1, kind="wait")
DAMAGE: dict[str, tuple[int, Edit, str]] = {
    "missing receive": (1, lambda steps: steps.remove(RECEIVE_1), "0 receives, not 1"),
    "double send": (
        0,
        lambda steps: steps.insert(3, Instruction("send", 0, 0, "activation", 1)),
        "2 sends, not 1",
    ),
    "missing step": (1, lambda steps: steps.remove(FORWARD_1), "0 times, not 1"),
    "double step": (1, lambda steps: steps.insert(4, FORWARD_1), "2 times, not 1"),
    "used before it came": (1, swap(WAIT_1, FORWARD_1), "comes before what it needs"),
    "awaited before it is posted": (1, swap(RECEIVE_1, WAIT_1), "comes before what it needs"),
    "missing wait": (1, lambda steps: steps.remove(WAIT_1), "0 waits, not 1"),
    "reduced too early": (
        0,
        lambda steps: [steps.insert(0, ENCODER_SUM), steps.insert(-1, DECODERS_SUM)],
        "comes before what it needs",
    ),
    "reduced in part": (
        0,
        lambda steps: steps.insert(-1, ENCODER_SUM),
        "reduce_decoders of stage 0 covers micro-batches \\[\\], which must",
    ),
    "reduced nothing": (
        0,
        lambda steps: steps.insert(-1, replace(ENCODER_SUM, stage=1)),
        "reduce_encoder of stage 1: it has nothing to reduce",
    ),
    "sent before it was made": (
        0,
        swap(Instruction("forward", 0, 0), Instruction("send", 0, 0, "activation", 1)),
        "comes before what it needs",
    ),
    "order": (
        1,
        swap(Instruction("decoder", 1, 0), Instruction("decoder", 1, 1)),
        "before micro-batch 0",
    ),
    "no flush": (0, lambda steps: steps.pop(), "not with flush"),
    "on another rank": (
        1,
        lambda steps: steps.insert(0, Instruction("send", 0, 0, "activation", 1)),
        "belongs to another rank",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_validator_finds_damage(name: str) -> None:
    rank, edit, message = DAMAGE[name]
    schedule = make("dib_w", Pipeline(2, (True, True)), 2).schedule
    with pytest.raises(ScheduleError, match=message):
        validate(damaged(schedule, rank, edit))


def test_validator_finds_deadlock() -> None:
    """Rank 0 waits for a gradient before it sends the activation that the gradient needs."""
    schedule = make("dib", Pipeline(2, (False, False)), 1).schedule
    wait = Instruction("wait", 0, 0, "gradient", 1)

    def edit(steps: Steps) -> None:
        steps.remove(wait)
        steps.insert(1, wait)

    with pytest.raises(Deadlock, match=r"rank 0 at .*gradient.* rank 1 at .*activation"):
        validate(damaged(schedule, 0, edit))


def test_validator_finds_memory() -> None:
    built = make("gpipe", Pipeline(2, (True, True)), 4)
    memory = [Memory(10, 8, 4)] * 2
    assert max(built.peaks) == 4 * 18
    validate(built.schedule, memory, 72)
    with pytest.raises(ScheduleError, match="rank 0: keeps 72 bytes of activations, limit 71"):
        validate(built.schedule, memory, 71)


def test_json_has_no_empty_fields() -> None:
    schedule = make("1f1b", Pipeline(2, (True, True)), 1).schedule
    first, wait, second = instructions_to_json(schedule, 1)[:3]
    assert wait == first | {"kind": "wait"}
    assert first == {
        "kind": "receive",
        "stage": 1,
        "microbatch": 0,
        "payload": "activation",
        "peer": 0,
    }
    assert second == {"kind": "forward", "stage": 1, "microbatch": 0}
