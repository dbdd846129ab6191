"""How schedules are built: textbook orders by formula, decoders in the bubbles by search.

The baselines are what a framework does that sees a stage as one module: decoders run inside the
stage's forward and backward. The others run decoders while a stage would wait. A decoder needs
nothing from other stages, so it runs forward and backward at any time between its stage's forward
and encoder backward. Paired decoders cannot run backward before the pair is complete: their
forwards move early, and their backwards to that moment.
Legend: P ranks, S stages, s a stage, M micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from deepmim_scale.pipeline.capacity import ends_with_capacity
from deepmim_scale.pipeline.ir import (
    Durations,
    Instruction,
    Kind,
    Pipeline,
    Reduction,
    Schedule,
    Style,
    insert_messages,
    stage_kinds,
)
from deepmim_scale.pipeline.list_scheduler import Policy, list_order
from deepmim_scale.pipeline.passes import insert_reductions, post_receives
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
POSTED_AHEAD = 1
"""Messages of a channel whose receives are posted before they are waited for, at least."""
TOLERANCE = 1.002
"""Among schedules within this factor of the fastest the one with the least memory is taken."""

Candidate = tuple[Style, Policy]
TextbookOrder = Callable[[Pipeline, int, int], Iterator[Instruction]]
"""(pipeline, rank, micro-batches) -> compute instructions of the rank."""


@dataclass(frozen=True)
class SchedulingProblem:
    """What a schedule is built for."""

    pipeline: Pipeline
    num_microbatches: int
    durations: Durations
    """Of the same kinds: with weight gradients apart where the schedule has them apart."""
    memory: Sequence[Memory]
    """Of each stage."""
    memory_limit: int | None = None
    """Bytes of activations on any rank that a search may use (default: the baseline's)."""
    quick: bool = False
    """Search less."""
    reduction: Reduction | None = None
    """When gradients are summed over the replicas of a stage; None: not a part of the schedule."""


@dataclass(frozen=True)
class BuiltSchedule:
    """A schedule with its simulation."""

    schedule: Schedule
    timeline: Timeline
    peaks: tuple[int, ...]
    """Peak activation bytes per rank."""


def simulated(schedule: Schedule, problem: SchedulingProblem) -> BuiltSchedule:
    """A schedule with its time and memory under the problem's durations."""
    if problem.reduction:
        schedule = insert_reductions(schedule, problem.reduction)
    return _timed(schedule, problem)


def _timed(schedule: Schedule, problem: SchedulingProblem) -> BuiltSchedule:
    timeline = simulate(schedule, problem.durations)
    return BuiltSchedule(schedule, timeline, peak_activation_bytes(schedule, problem.memory))


def build_by_formula(
    name: str, problem: SchedulingProblem, order: TextbookOrder, style: Style
) -> BuiltSchedule:
    """A textbook schedule."""
    pipeline, num_microbatches = problem.pipeline, problem.num_microbatches
    orders = [list(order(pipeline, rank, num_microbatches)) for rank in range(pipeline.num_ranks)]
    return _with_room(_with_messages(name, problem, num_microbatches, orders, style), problem)


def _with_messages(
    name: str,
    problem: SchedulingProblem,
    num_microbatches: int,
    orders: list[list[Instruction]],
    style: Style,
) -> BuiltSchedule:
    schedule = insert_messages(name, problem.pipeline, num_microbatches, orders, style)
    return simulated(post_receives(schedule, POSTED_AHEAD), problem)


def _with_room(built: BuiltSchedule, problem: SchedulingProblem) -> BuiltSchedule:
    """The same order, its receives posted so far ahead that it ends with capacity 1."""
    if problem.quick:
        return built
    # Room for one message more costs little; a rank that a send holds up may cost the run.
    ways = [post_receives(built.schedule, POSTED_AHEAD + more) for more in range(3)]
    ends = next((way for way in ways if ends_with_capacity(way, 1)), ways[0])
    return built if ends is ways[0] else _timed(ends, problem)


def build_gpipe(name: str, problem: SchedulingProblem) -> BuiltSchedule:
    """All forwards, then all backwards."""
    return build_by_formula(name, problem, _gpipe, Style(colocated=True))


def build_1f1b(name: str, problem: SchedulingProblem) -> BuiltSchedule:
    """One forward, one backward; on the V by search, as no formula is known for it."""
    pipeline, num_microbatches = problem.pipeline, problem.num_microbatches
    if pipeline.placement == "linear":
        style = Style(colocated=True)
        return build_by_formula(name, problem, _one_forward_one_backward, style)
    policies = [Policy(p, _falling(pipeline), num_microbatches) for p in ONE_MODULE]
    return _search(name, problem, [(Style(colocated=True), policy) for policy in policies])


def build_zb_h1(name: str, problem: SchedulingProblem) -> BuiltSchedule:
    """ZB-H1 (Qi et al., Zero Bubble Pipeline Parallelism, 2024, section 2)."""
    style = Style(colocated=True, split_backward=True)
    return build_by_formula(name, problem, _zb_h1, style)


def build_in_bubbles(
    name: str, problem: SchedulingProblem, split_backward: bool = False
) -> BuiltSchedule:
    """Decoders (and weight gradients) in the bubbles, by search within 1F1B's memory."""
    if problem.memory_limit is None:
        baseline = build_1f1b(name, problem)
        problem = replace(problem, memory_limit=max(baseline.peaks))
    candidates = list(_bubble_candidates(problem, split_backward))
    return _search(name, problem, candidates)


def _search(
    name: str, problem: SchedulingProblem, candidates: Sequence[Candidate]
) -> BuiltSchedule:
    """The fastest candidate within the memory limit; where none is, the one of least memory."""

    def listed(num_microbatches: int, style: Style, policy: Policy) -> BuiltSchedule:
        pipeline = problem.pipeline
        orders = list_order(pipeline, num_microbatches, problem.durations, policy, style)
        return _with_messages(name, problem, num_microbatches, orders, style)

    # A policy that is best for a few micro-batches per rank is best for more, and found sooner.
    per_rank = SEARCHED_MICROBATCHES // 2 if problem.quick else SEARCHED_MICROBATCHES
    most = max(per_rank * problem.pipeline.num_ranks, 8)
    searched = min(problem.num_microbatches, most)
    found = [(listed(searched, *candidate), candidate) for candidate in candidates]
    best, candidate = _fastest(found, problem.memory_limit)
    if searched == problem.num_microbatches:
        return _with_room(best, problem)
    return _with_room(listed(problem.num_microbatches, *candidate), problem)


def _fastest(
    found: list[tuple[BuiltSchedule, Candidate]], memory_limit: int | None
) -> tuple[BuiltSchedule, Candidate]:
    # A limit that no candidate keeps is raised to the least that one needs.
    least = min(max(built.peaks) for built, _ in found)
    limit = math.inf if memory_limit is None else max(memory_limit, least)
    allowed = [entry for entry in found if max(entry[0].peaks) <= limit]
    fastest = min(built.timeline.makespan for built, _ in allowed)
    # Equally fast ones differ in memory by tens of percent: take the smallest of them.
    near = [entry for entry in allowed if entry[0].timeline.makespan <= fastest * TOLERANCE]
    return min(near, key=lambda entry: (max(entry[0].peaks), entry[0].timeline.makespan))


def _bubble_candidates(problem: SchedulingProblem, split: bool) -> Iterator[Candidate]:
    pipeline, quick = problem.pipeline, problem.quick
    stages = pipeline.num_stages
    # A paired decoder cannot run backward before its partner: fusing both would deadlock.
    fused = (False,) if pipeline.paired else (True, False)
    # 1F1B's falling number, as many as there are stages everywhere, and one less; more where
    # messages take time, as a micro-batch on its way keeps nobody busy.
    levels = [(stages,) * stages]
    if not quick:
        levels.append((max(stages - 1, 1),) * stages)
    if problem.memory_limit is not None and not quick:
        levels += [(most,) * stages for most in range(1, stages)]
    waits = any(problem.durations.transfer.values())
    if waits:
        levels.append(tuple(most + stages for most in _falling(pipeline)))
    # Weight gradients kept for the end fill the wait for the last messages.
    keeps = split and waits and not quick
    if keeps:
        levels.append(tuple(most + 3 * stages for most in _falling(pipeline)))
    in_flights = dict.fromkeys([_falling(pipeline), *levels])
    # Each forward that waits for its backward keeps a decoder's activations alive.
    open_decoders = [1, 2, stages] if pipeline.paired else [1, 3] if split else [1]
    open_decoders += [6] if keeps else []
    patiences = (0.0,) if quick else (0.0, 1.0)
    priorities = PRIORITIES[:2] if quick else PRIORITIES
    choices = product(fused, priorities, in_flights, open_decoders, patiences)
    for one, priority, in_flight, opened, patience in choices:
        policy = Policy((*priority, *WEIGHT_KINDS), in_flight, opened, patience)
        yield Style(fused_decoders=one, split_backward=split), policy


def _falling(pipeline: Pipeline) -> tuple[int, ...]:
    """1F1B's micro-batches in flight: S on the first stage, 1 on the last."""
    return tuple(pipeline.num_stages - stage for stage in range(pipeline.num_stages))


def _steps(
    pipeline: Pipeline, stage: int, microbatch: int, kinds: Sequence[Kind]
) -> list[Instruction]:
    present = stage_kinds(pipeline, stage, Style(split_backward=True))
    return [Instruction(kind, stage, microbatch) for kind in kinds if kind in present]


def _gpipe(pipeline: Pipeline, rank: int, num_microbatches: int) -> Iterator[Instruction]:
    stages = pipeline.stages_of(rank)
    for kinds, order in ((FORWARD_KINDS, stages), (INPUT_KINDS, stages[::-1])):
        for stage, microbatch in product(order, range(num_microbatches)):
            yield from _steps(pipeline, stage, microbatch, kinds)


def _one_forward_one_backward(
    pipeline: Pipeline, stage: int, num_microbatches: int
) -> Iterator[Instruction]:
    # Stage s is ahead by the forwards that the stages below have yet to make.
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
        # Stage s lags by s weight gradients, which fill its wait at the end of the step.
        if step.kind == "encoder_backward" and step.microbatch >= stage:
            yield from _steps(pipeline, stage, weights, WEIGHT_KINDS)
            weights += 1
    for microbatch in range(weights, num_microbatches):
        yield from _steps(pipeline, stage, microbatch, WEIGHT_KINDS)
