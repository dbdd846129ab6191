"""Schedules in files: written by `deepmim-scale schedule --json` or by hand, read by a run.

`{"format": 2, "schedule": name, "placement": ..., "layout": ..., "microbatches": M,
"style": {...}, "ranks": [{"rank": 0, "instructions": [{"kind": ..., "stage": ...}, ...]}, ...]}`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from deepmim_scale.config import MAX_MICROBATCHES
from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.ir import Instruction, Kind, Payload, Pipeline, Schedule, Style

FORMAT = 2
"""Of the files that are written. A newer one may hold kinds that this release does not know.

In format 1 a receive waited for its message; since format 2 it is posted, and `wait` waits.
"""
MESSAGES = ("send", "receive", "wait")
# A run's --reduction says when gradients are summed, whatever the order.
_KINDS = tuple(kind for kind in get_args(Kind) if not kind.startswith("reduce_"))
_PAYLOADS = get_args(Payload)
_FIELDS = {"kind", "stage", "microbatch", "payload", "peer"}


def instructions_to_json(schedule: Schedule, rank: int) -> list[dict[str, Any]]:
    """A rank's instructions as plain dictionaries without empty fields."""
    return [
        {key: value for key, value in vars(instruction).items() if value is not None}
        for instruction in schedule.ranks[rank]
    ]


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """What a file must hold of a schedule; the layout is the caller's to add."""
    return {
        "format": FORMAT,
        "schedule": schedule.name,
        "placement": schedule.pipeline.placement,
        "microbatches": schedule.num_microbatches,
        "style": vars(schedule.style),
        "ranks": [
            {"rank": rank, "instructions": instructions_to_json(schedule, rank)}
            for rank in range(len(schedule.ranks))
        ],
    }


def schedule_from_json(path: str, content: dict[str, Any], pipeline: Pipeline) -> Schedule:
    """The schedule of a file's content for the pipeline that it names.

    UserError names file, place and rule. Whether the schedule may be executed is for `validate`.
    """
    version = _take(path, content, "format", int)
    if not 1 <= version <= FORMAT:
        raise UserError(
            f"{path}: format={version}: this release reads formats 1 to {FORMAT}; "
            "use the release that wrote it"
        )
    style = _take(path, content, "style", dict)
    unknown = style.keys() - vars(Style()).keys()
    if unknown or not all(isinstance(value, bool) for value in style.values()):
        known = ", ".join(vars(Style()))
        raise UserError(f"{path}: style={style}: must hold true or false for {known}")
    ranks = _take(path, content, "ranks", list)
    # The pipeline follows from placement and layout, so this finds a file put together wrongly.
    if len(ranks) != pipeline.num_ranks:
        raise UserError(
            f"{path}: has {len(ranks)} ranks, this pipeline {pipeline.num_ranks}; "
            "use the --stages and --placement that it was made for"
        )
    lists = []
    for rank, entry in enumerate(ranks):
        where = f"{path}: rank {rank}"
        if not isinstance(entry, dict) or entry.get("rank", rank) != rank:
            raise UserError(f"{where}: must be an object with rank={rank} and instructions")
        steps = _take(where, entry, "instructions", list)
        if not steps:
            raise UserError(f"{where}: has no instructions; it must end with flush")
        instructions = [_instruction(where, i, step) for i, step in enumerate(steps)]
        lists.append(tuple(_with_waits(instructions) if version == 1 else instructions))
    name = _take(path, content, "schedule", str)
    microbatches = _take(path, content, "microbatches", int)
    if not 1 <= microbatches <= MAX_MICROBATCHES:
        raise UserError(f"{path}: microbatches={microbatches}: must be 1 to {MAX_MICROBATCHES}")
    return Schedule(name, pipeline, microbatches, Style(**style), tuple(lists))


def _with_waits(instructions: list[Instruction]) -> Iterator[Instruction]:
    for step in instructions:
        yield step
        if step.kind == "receive":
            yield replace(step, kind="wait")


def _take(path: str, content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = "missing" if key not in content else f"{key}={value!r:.60}"
        raise UserError(f"{path}: {found}: {key} must be of type {kind.__name__}")
    return value


def _instruction(where: str, number: int, step: Any) -> Instruction:
    where = f"{where}, instruction {number}"
    if not isinstance(step, dict) or step.keys() - _FIELDS:
        raise UserError(
            f"{where}: {step!r:.80}: must be an object with {', '.join(sorted(_FIELDS))}"
        )
    kind, payload = step.get("kind"), step.get("payload")
    if kind not in _KINDS:
        raise UserError(f"{where}: kind={kind!r:.40}: unknown; use one of {', '.join(_KINDS)}")
    # Only messages have two ends; a computation with a peer is a slip of the hand.
    is_message = kind in MESSAGES
    if (payload is None, step.get("peer") is None) != (not is_message, not is_message):
        raise UserError(
            f"{where}: send, receive and wait, and only these, have a payload and a peer"
        )
    if is_message and payload not in _PAYLOADS:
        known = ", ".join(_PAYLOADS)
        raise UserError(f"{where}: payload={payload!r:.40}: unknown; use one of {known}")
    numbers = [step.get("stage"), step.get("microbatch"), *([step["peer"]] if is_message else [])]
    if not all(type(value) is int for value in numbers):
        raise UserError(f"{where}: stage, microbatch and peer must be whole numbers")
    return Instruction(**step)
