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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from deepmim_scale.plan.greedy import Policy, list_order
from deepmim_scale.plan.schedule import (
    Instruction,
    Kind,
    Name,
    Pipeline,
    Schedule,
    Style,
    Times,
    stage_kinds,
    with_messages,
)
from deepmim_scale.plan.simulate import Memory, Timeline, peak_activation_bytes, simulate

FORWARD_KINDS: tuple[Kind, ...] = ("forward", "decoder_forward")
INPUT_KINDS: tuple[Kind, ...] = ("decoder_backward", "encoder_backward")
WEIGHT_KINDS: tuple[Kind, ...] = ("decoder_weight_gradient", "encoder_weight_gradient")
PRIORITIES: tuple[tuple[Kind, ...], ...] = (
    ("encoder_backward", "decoder", "decoder_backward", "decoder_forward", "forward"),
    ("encoder_backward", "decoder_backward", "forward", "decoder", "decoder_forward"),
    ("forward", "encoder_backward", "decoder", "decoder_backward", "decoder_forward"),
)
ONE_MODULE: tuple[Kind, ...] = (*INPUT_KINDS[::-1], "decoder_forward", "forward")
TOLERANCE = 1.002
"""Among schedules within this factor of the fastest the one with the least memory is taken."""


@dataclass(frozen=True)
class Built:
    """A schedule with its simulation."""

    schedule: Schedule
    timeline: Timeline
    peaks: tuple[int, ...]
    """Peak activation bytes per rank."""


def build(
    name: Name,
    pipeline: Pipeline,
    num_microbatches: int,
    times: Times,
    memory: Sequence[Memory],
    memory_limit: int | None = None,
) -> Built:
    """Make a schedule; `dib` and `dib_w` search for the fastest within `memory_limit` bytes.

    Without a limit their peak stays within that of the least they can do or 1f1b's, whichever is
    larger. `times` must be those of the same kinds: weight gradients apart for `dib_w`, `zb_h1`.
    """
    if name in ("dib", "dib_w"):
        return _search(name, pipeline, num_microbatches, times, memory, memory_limit)
    if pipeline.placement == "v":
        orders = _folded(name, pipeline, num_microbatches, times)
    else:
        fill = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward, "zb_h1": _zb_h1}[name]
        orders = [
            list(fill(pipeline, stage, num_microbatches)) for stage in range(pipeline.num_ranks)
        ]
    style = Style(inline=True, split=name == "zb_h1")
    schedule = with_messages(name, pipeline, num_microbatches, orders, style)
    return Built(schedule, simulate(schedule, times), peak_activation_bytes(schedule, memory))


def _steps(
    pipeline: Pipeline, stage: int, microbatch: int, kinds: Sequence[Kind]
) -> list[Instruction]:
    present = stage_kinds(pipeline, stage, Style(split=True))
    return [Instruction(kind, stage, microbatch) for kind in kinds if kind in present]


def _gpipe(pipeline: Pipeline, stage: int, num_microbatches: int) -> Iterator[Instruction]:
    for kinds in (FORWARD_KINDS, INPUT_KINDS):
        for microbatch in range(num_microbatches):
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
    warmup = min(pipeline.num_stages - 1 - stage, num_microbatches)
    for microbatch in range(num_microbatches + warmup):
        if microbatch < num_microbatches:
            yield from _steps(pipeline, stage, microbatch, FORWARD_KINDS)
        if microbatch >= warmup:
            yield from _steps(pipeline, stage, microbatch - warmup, INPUT_KINDS)
        if microbatch >= warmup + stage:
            yield from _steps(pipeline, stage, microbatch - warmup - stage, WEIGHT_KINDS)
    for microbatch in range(max(0, num_microbatches - stage), num_microbatches):
        yield from _steps(pipeline, stage, microbatch, WEIGHT_KINDS)


def _folded(
    name: Name, pipeline: Pipeline, num_microbatches: int, times: Times
) -> list[list[Instruction]]:
    """gpipe and 1f1b on the V: both stages of a rank share its time, backward before forward."""
    if name == "gpipe":
        return [
            [
                step
                for kinds, stages in (
                    (FORWARD_KINDS, pipeline.stages_of(rank)),
                    (INPUT_KINDS, pipeline.stages_of(rank)[::-1]),
                )
                for stage in stages
                for microbatch in range(num_microbatches)
                for step in _steps(pipeline, stage, microbatch, kinds)
            ]
            for rank in range(pipeline.num_ranks)
        ]
    return list_order(
        pipeline, num_microbatches, times, _one_module(pipeline, num_microbatches),
        Style(inline=True),
    )  # fmt: skip


def _one_module(pipeline: Pipeline, num_microbatches: int) -> Policy:
    return Policy(ONE_MODULE, _falling(pipeline), num_microbatches)


def _falling(pipeline: Pipeline) -> tuple[int, ...]:
    """1F1B's micro-batches in flight: S on the first stage, 1 on the last."""
    return tuple(pipeline.num_stages - stage for stage in range(pipeline.num_stages))


def _search(
    name: Name,
    pipeline: Pipeline,
    num_microbatches: int,
    times: Times,
    memory: Sequence[Memory],
    memory_limit: int | None,
) -> Built:
    stages, split = pipeline.num_stages, name == "dib_w"
    if pipeline.paired:
        styles, open_decoders = [Style()], (1, 2, stages)
    elif split:
        styles, open_decoders = [Style(fused=True, split=True)], (1, 3)
    else:
        styles, open_decoders = [Style(fused=True), Style()], (1,)
    in_flights = (_falling(pipeline), (stages,) * stages)
    found: list[Built] = []
    for style, priority, in_flight, opened, patience in product(
        styles, PRIORITIES, in_flights, open_decoders, (0.0, 1.0)
    ):
        policy = Policy((*priority, *WEIGHT_KINDS), in_flight, opened, patience)
        orders = list_order(pipeline, num_microbatches, times, policy, style)
        schedule = with_messages(name, pipeline, num_microbatches, orders, style)
        peaks = peak_activation_bytes(schedule, memory)
        found.append(Built(schedule, simulate(schedule, times), peaks))
    if memory_limit is None:
        style = Style(inline=True)
        policy = _one_module(pipeline, num_microbatches)
        orders = list_order(pipeline, num_microbatches, times, policy, style)
        baseline = with_messages(name, pipeline, num_microbatches, orders, style)
        memory_limit = max(peak_activation_bytes(baseline, memory))
    least = min(max(built.peaks) for built in found)
    allowed = [built for built in found if max(built.peaks) <= max(memory_limit, least)]
    fastest = min(built.timeline.makespan for built in allowed)
    near = [built for built in allowed if built.timeline.makespan <= fastest * TOLERANCE]
    return min(near, key=lambda built: (max(built.peaks), built.timeline.makespan))
