"""How far the runs of a study are, from its folder alone: whoever runs them, and wherever."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from deepmim_scale.runs.folder import LOCK, METRICS
from deepmim_scale.study.cells import Cell
from deepmim_scale.study.runner import failure, finished_rows, run_folder
from deepmim_scale.study.settings import StudyArguments


class RunStatus(NamedTuple):
    """Of one run of a cell."""

    run: str
    state: str
    """done, running, stopped, failed or waiting."""
    steps: int
    note: str = ""


def status_of(args: StudyArguments, cells: list[Cell]) -> list[RunStatus]:
    """Every legal run of the study."""
    return [
        _status(args, cell.run(repeat))
        for cell in cells
        if cell.job
        for repeat in range(args.repeats)
    ]


def _status(args: StudyArguments, run: str) -> RunStatus:
    folder = run_folder(args, run)
    metrics = folder / METRICS
    steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    if finished_rows(args, run):
        return RunStatus(run, "done", steps)
    if (folder / LOCK).is_file():  # a run that was killed leaves it until it goes on
        return RunStatus(run, "running", steps)
    problem = failure(args, run)
    if problem:
        return RunStatus(run, "failed", steps, problem)
    return RunStatus(run, "stopped" if steps else "waiting", steps)


def describe(args: StudyArguments, found: list[RunStatus]) -> list[str]:
    """A line for each run, and one for all."""
    width = max(len(status.run) for status in found)
    lines = [
        f"{status.run:{width}s}  {status.state:8s} {status.steps:6d}/{args.steps}  {status.note}"
        for status in found
    ]
    counts = Counter(status.state for status in found)
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    return [line.rstrip() for line in lines] + [f"{len(found)} runs: {total}"]
