"""Generators of schedules: textbook orders by formula, decoder-in-the-bubble by search.

Legend: P ranks, S stages, s a stage, M micro-batches.

| name    | decoders                               | weight gradients |
|---------|----------------------------------------|------------------|
| `gpipe` | inside the stage's forward and backward| in the backward  |
| `1f1b`  | the same                               | in the backward  |
| `zb_h1` | the same (comparison only)             | apart            |
| `dib`   | run while the stage would wait         | in the backward  |
| `dib_w` | run while the stage would wait         | apart            |

`gpipe` and `1f1b` are the baselines: what a framework does with a stage that it sees as one module.
`dib`: a decoder needs nothing from other stages, so it runs forward and backward at any time
between its stage's forward and encoder backward. MIRL's decoders cannot run backward before the
pair is complete; there `dib` moves their forwards early and their backwards to that moment.
ZB-H1: Qi et al., Zero Bubble Pipeline Parallelism, 2024, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from deepmim_scale.pipeline.ir import (
    Durations,
    Instruction,
    Kind,
    Name,
    Pipeline,
    Schedule,
    Style,
    insert_messages,
    stage_kinds,
)
from deepmim_scale.pipeline.list_scheduler import Policy, list_order
from deepmim_scale.pipeline.simulate import Memory, Timeline, peak_activation_bytes, simulate

FORWARD_KINDS: tuple[Kind, ...] = ("forward", "decoder_forward")
INPUT_KINDS: tuple[Kind, ...] = ("decoder_backward", "encoder_backward")
WEIGHT_KINDS: tuple[Kind, ...] = ("decoder_weight_gradient", "encoder_weight_gradient")
PRIORITIES: tuple[tuple[Kind, ...], ...] = (
    ("encoder_backward", "decoder", "decoder_backward", "decoder_forward", "forward"),
    ("encoder_backward", "decoder_backward", "forward", "decoder", "decoder_forward"),
    ("forward", "encoder_backward", "decoder", "decoder_backward", "decoder_forward"),
)
ONE_MODULE: tuple[tuple[Kind, ...], ...] = (
    (*INPUT_KINDS[::-1], *FORWARD_KINDS[::-1]),
    (*FORWARD_KINDS, *INPUT_KINDS[::-1]),
)
SEARCHED_MICROBATCHES = 4
"""Per rank: the policy that is best for so many micro-batches is taken for any larger number."""
TOLERANCE = 1.002
"""Among schedules within this factor of the fastest the one with the least memory is taken."""

Candidate = tuple[Style, Policy]


@dataclass(frozen=True)
class BuiltSchedule:
    """A schedule with its simulation."""

    schedule: Schedule
    timeline: Timeline
    peaks: tuple[int, ...]
    """Peak activation bytes per rank."""


def build(
    name: Name,
    pipeline: Pipeline,
    num_microbatches: int,
    times: Durations,
    memory: Sequence[Memory],
    memory_limit: int | None = None,
    *,
    quick: bool = False,
) -> BuiltSchedule:
    """Make a schedule; `dib`, `dib_w` and `1f1b` on the V are searched for (`quick`: less).

    The search is for the fastest within `memory_limit` bytes of activations on any rank, by default
    1f1b's; where nothing is, for the least memory. `times` must be those of the same kinds: with
    weight gradients apart for `dib_w` and `zb_h1`.
    """
    order = partial(_listed, name, pipeline, times, memory)
    if name in ("dib", "dib_w"):
        if memory_limit is None:
            baseline = build("1f1b", pipeline, num_microbatches, times, memory)
            memory_limit = max(baseline.peaks)
        candidates = list(_bubble_candidates(pipeline, name == "dib_w", quick))
    elif name == "1f1b" and pipeline.placement == "v":
        candidates = [
            (Style(inline=True), Policy(priority, _falling(pipeline), num_microbatches))
            for priority in ONE_MODULE
        ]
    else:
        style = Style(inline=True, split=name == "zb_h1")
        fill = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward, "zb_h1": _zb_h1}[name]
        orders = [list(fill(pipeline, r, num_microbatches)) for r in range(pipeline.num_ranks)]
        return _complete(name, pipeline, num_microbatches, orders, style, times, memory)
    searched = min(num_microbatches, SEARCHED_MICROBATCHES * pipeline.num_ranks)
    found = [(order(searched, *candidate), candidate) for candidate in candidates]
    best, candidate = _fastest(found, memory_limit)
    return best if searched == num_microbatches else order(num_microbatches, *candidate)


def _listed(
    name: Name,
    pipeline: Pipeline,
    times: Durations,
    memory: Sequence[Memory],
    num_microbatches: int,
    style: Style,
    policy: Policy,
) -> BuiltSchedule:
    orders = list_order(pipeline, num_microbatches, times, policy, style)
    return _complete(name, pipeline, num_microbatches, orders, style, times, memory)


def _complete(
    name: Name,
    pipeline: Pipeline,
    num_microbatches: int,
    orders: list[list[Instruction]],
    style: Style,
    times: Durations,
    memory: Sequence[Memory],
) -> BuiltSchedule:
    schedule = insert_messages(name, pipeline, num_microbatches, orders, style)
    return BuiltSchedule(
        schedule, simulate(schedule, times), peak_activation_bytes(schedule, memory)
    )


def _fastest(
    found: list[tuple[BuiltSchedule, Candidate]], memory_limit: int | None
) -> tuple[BuiltSchedule, Candidate]:
    least = min(max(built.peaks) for built, _ in found)
    limit = math.inf if memory_limit is None else max(memory_limit, least)
    allowed = [entry for entry in found if max(entry[0].peaks) <= limit]
    fastest = min(built.timeline.makespan for built, _ in allowed)
    near = [entry for entry in allowed if entry[0].timeline.makespan <= fastest * TOLERANCE]
    return min(near, key=lambda entry: (max(entry[0].peaks), entry[0].timeline.makespan))


def _bubble_candidates(pipeline: Pipeline, split: bool, quick: bool) -> Iterator[Candidate]:
    stages = pipeline.num_stages
    fused = (False,) if pipeline.paired else (True, False)
    in_flights = dict.fromkeys(
        [_falling(pipeline), *((most,) * stages for most in (stages, max(stages - 1, 1)))]
    )
    open_decoders = (1, 2, stages) if pipeline.paired else (1, 3) if split else (1,)
    patiences = (0.0,) if quick else (0.0, 1.0)
    priorities = PRIORITIES[:2] if quick else PRIORITIES
    choices = product(fused, priorities, in_flights, open_decoders, patiences)
    for one, priority, in_flight, opened, patience in choices:
        policy = Policy((*priority, *WEIGHT_KINDS), in_flight, opened, patience)
        yield Style(fused=one, split=split), policy


def _falling(pipeline: Pipeline) -> tuple[int, ...]:
    """1F1B's micro-batches in flight: S on the first stage, 1 on the last."""
    return tuple(pipeline.num_stages - stage for stage in range(pipeline.num_stages))


def _steps(
    pipeline: Pipeline, stage: int, microbatch: int, kinds: Sequence[Kind]
) -> list[Instruction]:
    present = stage_kinds(pipeline, stage, Style(split=True))
    return [Instruction(kind, stage, microbatch) for kind in kinds if kind in present]


def _gpipe(pipeline: Pipeline, rank: int, num_microbatches: int) -> Iterator[Instruction]:
    stages = pipeline.stages_of(rank)
    for kinds, order in ((FORWARD_KINDS, stages), (INPUT_KINDS, stages[::-1])):
        for stage, microbatch in product(order, range(num_microbatches)):
            yield from _steps(pipeline, stage, microbatch, kinds)


def _one_forward_one_backward(
    pipeline: Pipeline, stage: int, num_microbatches: int
) -> Iterator[Instruction]:
    warmup = min(pipeline.num_stages - 1 - stage, num_microbatches)
    for microbatch in range(num_microbatches + warmup):
        if microbatch < num_microbatches:
            yield from _steps(pipeline, stage, microbatch, FORWARD_KINDS)
        if microbatch >= warmup:
            yield from _steps(pipeline, stage, microbatch - warmup, INPUT_KINDS)


def _zb_h1(pipeline: Pipeline, stage: int, num_microbatches: int) -> Iterator[Instruction]:
    """1F1B in which stage s puts off its weight gradients by s micro-batches."""
    weights = 0
    for step in _one_forward_one_backward(pipeline, stage, num_microbatches):
        yield step
        if step.kind == "encoder_backward" and step.microbatch >= stage:
            yield from _steps(pipeline, stage, weights, WEIGHT_KINDS)
            weights += 1
    for microbatch in range(weights, num_microbatches):
        yield from _steps(pipeline, stage, microbatch, WEIGHT_KINDS)
