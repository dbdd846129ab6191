"""Checks a schedule without running it: completeness, order, dependencies, messages, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from deepmim_scale.pipeline.ir import (
    Durations,
    Instruction,
    Kind,
    Message,
    Schedule,
    dependencies,
    last_gradients,
    stage_kinds,
)
from deepmim_scale.pipeline.simulate import Memory, peak_activation_bytes, simulate


class ScheduleError(ValueError):
    """A schedule that must not be executed."""


def validate(
    schedule: Schedule, memory: Sequence[Memory] = (), memory_limit: int | None = None
) -> None:
    """Raise ScheduleError (or Deadlock) naming rank and instruction of the first fault.

    With a memory limit (bytes of activations, any rank) also its peak is checked.
    """
    _check_style(schedule)
    ranks = range(len(schedule.ranks))
    for rank in ranks:
        _check_completeness(schedule, rank)
    sources = _message_sources(schedule)
    _check_messages(schedule, sources)
    for rank in ranks:
        _check_order(schedule, rank)
        _check_reductions(schedule, rank)
        _check_dependencies(schedule, rank, sources)
    # Ranks that each wait for another's message pass every check of a single rank. Whether they
    # end does not depend on how long things take.
    simulate(schedule, Durations({}, {}))
    if memory_limit is not None:
        peaks = peak_activation_bytes(schedule, memory)
        for rank, peak in enumerate(peaks):
            if peak > memory_limit:
                raise ScheduleError(
                    f"rank {rank}: keeps {peak} bytes of activations, limit {memory_limit}"
                )


def _check_style(schedule: Schedule) -> None:
    """A fused decoder waits for nothing but its own stage's forward."""
    style = schedule.style
    if style.fused_decoders and style.colocated:
        raise ScheduleError("style: fused_decoders and colocated exclude each other")
    if style.fused_decoders and schedule.pipeline.paired:
        raise ScheduleError("style: fused_decoders cannot be where losses join two decoders")


def _check_completeness(schedule: Schedule, rank: int) -> None:
    """Each micro-batch passes each kind of each stage of the rank once, and nothing else."""
    pipeline = schedule.pipeline
    expected = Counter(
        Instruction(kind, stage, microbatch)
        for stage in pipeline.stages_of(rank)
        for kind in stage_kinds(pipeline, stage, schedule.style)
        for microbatch in range(schedule.num_microbatches)
    )
    # Sends are waited for in the flush alone: without it a tensor could be freed too early.
    last = schedule.ranks[rank][-1]
    flush = Instruction("flush", pipeline.stages_of(rank)[0], -1)
    if last != flush:
        raise ScheduleError(f"rank {rank}: ends with {last}, not with flush")
    found = Counter(
        step
        for step in schedule.ranks[rank]
        if step.payload is None and step.kind not in last_gradients(schedule.style)
    )
    expected[flush] = 1
    for step in (expected - found) | (found - expected):
        raise ScheduleError(f"rank {rank}: {step}: {found[step]} times, not {expected[step]}")


def _check_order(schedule: Schedule, rank: int) -> None:
    """Micro-batches of one stage and kind (and payload and peer) come as 0, 1, 2, ..."""
    # Sums of gradients are equal bit for bit because of this order, and messages need no tags.
    following: Counter[tuple[object, ...]] = Counter()
    for step in schedule.ranks[rank][:-1]:
        if step.kind in last_gradients(schedule.style):
            continue
        key = (step.kind, step.stage, step.payload, step.peer)
        if step.microbatch != following[key]:
            raise ScheduleError(f"rank {rank}: {step} before micro-batch {following[key]}")
        following[key] += 1


def _check_reductions(schedule: Schedule, rank: int) -> None:
    """Each part's reductions come in order and end with the last micro-batch, or there are none."""
    sums = last_gradients(schedule.style)
    found: dict[tuple[Kind, int], list[int]] = {}
    for step in schedule.ranks[rank]:
        if step.kind in sums:
            found.setdefault((step.kind, step.stage), []).append(step.microbatch)
    parts = [
        (kind, stage)
        for stage in schedule.pipeline.stages_of(rank)
        for kind in sums
        if sums[kind] in stage_kinds(schedule.pipeline, stage, schedule.style)
    ]
    for kind, stage in dict.fromkeys([*found, *parts]):
        if (kind, stage) not in parts:
            raise ScheduleError(f"rank {rank}: {kind} of stage {stage}: it has nothing to reduce")
        covered = found.get((kind, stage), [])
        last = schedule.num_microbatches - 1
        if found and (covered != sorted(set(covered)) or covered[-1:] != [last]):
            raise ScheduleError(
                f"rank {rank}: {kind} of stage {stage} covers micro-batches {covered}, which must "
                f"rise and end with {last}"
            )


def _check_dependencies(schedule: Schedule, rank: int, sources: dict[Message, Instruction]) -> None:
    """What a step relies on is done before on this rank, or received; what is sent is made."""
    pipeline, sums = schedule.pipeline, last_gradients(schedule.style)
    done: set[Instruction | Message] = set()
    steps = schedule.ranks[rank]
    for step, following in zip(steps, (*steps[1:], None), strict=True):
        if step.kind == "receive":
            # It needs its sender, which is on another rank: the simulation knows of that.
            required: list[Instruction | Message] = []
        elif step.kind == "wait":
            required = [replace(step, kind="receive")]
        elif step.kind in sums:
            # It may stand just before what completes its gradients, and then runs beside that.
            completing = replace(step, kind=sums[step.kind])
            required = [completing] if following != completing else []
        elif step.kind == "send":
            required = [sources.get(step.message, step)]
        else:
            required = [
                source
                if pipeline.rank_of(source.stage) == rank
                else (payload, source.stage, step.stage, step.microbatch)
                for source, payload in dependencies(pipeline, step, schedule.style)
            ]
        for need in required:
            if need not in done:
                what = need if isinstance(need, Instruction) else _describe(need)
                raise ScheduleError(f"rank {rank}: {step} comes before what it needs, {what}")
        # What has come stands for the step that made it elsewhere.
        done.add(step.message if step.kind == "wait" else step)


def _message_sources(schedule: Schedule) -> dict[Message, Instruction]:
    """Every message that the pipeline needs and the step that makes its tensor."""
    pipeline = schedule.pipeline
    return {
        (payload, source.stage, step.stage, step.microbatch): source
        for rank, instructions in enumerate(schedule.ranks)
        for step in instructions
        if step.payload is None
        for source, payload in dependencies(pipeline, step, schedule.style)
        if pipeline.rank_of(source.stage) != rank
    }


def _check_messages(schedule: Schedule, sources: dict[Message, Instruction]) -> None:
    """Each needed message has one send and one receive, on the ranks of its two stages."""
    found: dict[str, Counter[Message]] = {k: Counter() for k in ("send", "receive", "wait")}
    for rank, instructions in enumerate(schedule.ranks):
        for step in instructions:
            if step.payload is None:
                continue
            if schedule.pipeline.rank_of(step.stage) != rank:
                raise ScheduleError(f"rank {rank}: {step} belongs to another rank")
            found[step.kind][step.message] += 1
    for kind, counts in found.items():
        # Needed ones first, so that the message tells what is missing before what is too much.
        for message in dict.fromkeys([*sources, *counts]):
            _, source, target, _ = message
            stage = source if kind == "send" else target
            assert stage is not None, "a message that is needed or found has two ends"
            count, needed = counts[message], int(message in sources)
            if count != needed:
                rank = schedule.pipeline.rank_of(stage)
                what = f"{_describe(message)}: {count} {kind}s, not {needed}"
                raise ScheduleError(f"rank {rank}: {what}")


def _describe(message: Message) -> str:
    payload, source, target, microbatch = message
    return f"{payload} from stage {source} to stage {target}, micro-batch {microbatch}"
