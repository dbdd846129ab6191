"""One step as it ran on all ranks, beside its simulation, and where its idle time went.

A rank's step is cut into shares of its whole time, from the wait for images to the updated weights:

| share       | what the rank does                                                            |
|-------------|-------------------------------------------------------------------------------|
| `computing` | instructions that keep it busy                                                |
| `updating`  | norms, optimizer, weights gathered                                            |
| `message`   | waits for a message of another stage, or for its own to leave                 |
| `reduction` | waits for sums over the replicas after its last instruction                   |
| `data`      | waits for images before the step                                              |
| `host`      | the rest: on a GPU what the host was too late with, on a CPU Python           |
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepmim_scale.config import RunConfig
from deepmim_scale.parallel.clock import Clock
from deepmim_scale.pipeline.draw import MEASURED, SIMULATED, chrome_trace
from deepmim_scale.pipeline.ir import COMPUTE_KINDS, Instruction, Kind, Schedule
from deepmim_scale.pipeline.simulate import Event, Timeline, simulate, timeline_of
from deepmim_scale.plan.resolve import FLOPS_PER_SECOND, TrainingPlan
from deepmim_scale.plan.timing import profiled_times, times_of
from deepmim_scale.runs.folder import TRACES, writing

Span = tuple[Instruction, float, float]
"""Instruction, start and end in seconds since the step began."""


@dataclass(frozen=True)
class RankTrace:
    """One rank's step, seconds."""

    spans: Sequence[Span]
    data: float
    """Wait for images before the step."""
    reduced: float
    """When the gradients were summed."""
    updated: float
    """When the step was over."""
    host: str

    def shares(self) -> dict[str, float]:
        """Share of the step by what the rank did; they add up to 1."""
        executed = self.spans[-1][2]
        seconds = {"computing": 0.0, "updating": self.updated - self.reduced, "message": 0.0}
        seconds |= {"reduction": self.reduced - executed, "data": self.data}
        for step, start, end in self.spans:
            if step.kind in COMPUTE_KINDS:
                seconds["computing"] += end - start
            elif step.kind in ("wait", "flush"):
                seconds["message"] += end - start
        whole = self.data + self.updated
        shares = {name: value / whole for name, value in seconds.items()}
        return shares | {"host": 1 - sum(shares.values())}


class StepTrace:
    """Marks of one step on this rank; every rank makes one and calls the same."""

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        dist.barrier()  # all ranks begin together, so that their times can be compared
        self._began = self._reduced = self._updated = self._clock.mark()

    def mark_reduced(self) -> None:
        """The gradients are summed."""
        self._reduced = self._clock.mark()

    def mark_updated(self) -> None:
        """The weights are updated."""
        self._updated = self._clock.mark()

    def finish(self, marks: Sequence[tuple[Instruction, Any, Any]], data: float) -> list[RankTrace]:
        """The traces of all ranks; `marks` are the executor's."""

        def since(mark: Any) -> float:
            return self._clock.seconds(self._began, mark)

        spans = [(step, since(start), since(end)) for step, start, end in marks]
        ends = since(self._reduced), since(self._updated)
        mine = RankTrace(spans, data, *ends, socket.gethostname())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return everyone


def simulated_again(
    config: RunConfig, plan: TrainingPlan, schedule: Schedule, ranks: Sequence[RankTrace]
) -> Timeline:
    """The same order, simulated with what its instructions took on average; messages take none."""
    found: dict[tuple[Kind, int], list[float]] = {}
    for step, start, end in (span for trace in ranks for span in trace.spans):
        if step.kind in COMPUTE_KINDS:
            found.setdefault((step.kind, step.stage), []).append(end - start)
    measured = {key: sum(seconds) / len(seconds) for key, seconds in found.items()}
    split, size = schedule.style.split_backward, config.microbatch_size
    predicted = times_of(config.model, plan.layout, size, FLOPS_PER_SECOND, split=split)
    return simulate(schedule, profiled_times(measured, predicted))


def write_step_trace(
    folder: str,
    step: int,
    facts: Mapping[str, Any],
    ranks: Sequence[RankTrace],
    simulated: Timeline,
) -> dict[str, float]:
    """Write the step of all ranks as a Chrome trace with `facts`; the mean shares of the ranks."""
    events = [Event(rank, *span) for rank, trace in enumerate(ranks) for span in trace.spans]
    shares = [trace.shares() for trace in ranks]
    mean = {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}
    content = chrome_trace({MEASURED: timeline_of(events, len(ranks)), SIMULATED: simulated})
    content |= {"step": step, "shares": mean, "shares_by_rank": shares, **facts}
    content["reduction_seconds"] = max(trace.reduced - trace.spans[-1][2] for trace in ranks)
    content["num_hosts"] = len({trace.host for trace in ranks})
    with writing(folder):
        (Path(folder) / TRACES.replace("*", f"{step:08d}")).write_text(json.dumps(content))
    return mean


def describe(step: int, shares: dict[str, float]) -> str:
    """The shares in one line."""
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return f"step {step} in shares of its time, mean over the ranks: {parts}"
