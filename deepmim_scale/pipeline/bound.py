"""What no order of a step's instructions can beat."""

from __future__ import annotations

from collections import defaultdict

from deepmim_scale.pipeline.ir import (
    Durations,
    Instruction,
    Pipeline,
    Style,
    dependencies,
    stage_kinds,
)
from deepmim_scale.pipeline.list_scheduler import Work


def least_makespan(
    pipeline: Pipeline, num_microbatches: int, durations: Durations, style: Style
) -> float:
    """Seconds below which no order ends, messages and sums hidden.

    A rank's work cannot begin before its first instruction's way down, and its last instruction's
    way up follows it, whichever instructions these are.
    """
    works: list[Work] = [
        (kind, stage)
        for stage in range(pipeline.num_stages)
        for kind in stage_kinds(pipeline, stage, style)
    ]
    seconds = {work: durations.of(Instruction(*work, microbatch=0)) for work in works}
    sources: dict[Work, list[Work]] = {
        work: [
            (source.kind, source.stage)
            for source, _ in dependencies(pipeline, Instruction(*work, microbatch=0), style)
        ]
        for work in works
    }
    targets: dict[Work, list[Work]] = defaultdict(list)
    for work, needed in sources.items():
        for source in needed:
            targets[source].append(work)

    def longest(work: Work, following: dict[Work, list[Work]], known: dict[Work, float]) -> float:
        """Seconds of the longest chain beyond a work."""
        if work not in known:
            chains = [seconds[w] + longest(w, following, known) for w in following.get(work, [])]
            known[work] = max(chains, default=0.0)
        return known[work]

    before: dict[Work, float] = {}
    after: dict[Work, float] = {}
    bounds = []
    for rank in range(pipeline.num_ranks):
        mine = [work for work in works if pipeline.rank_of(work[1]) == rank]
        head = min(longest(work, sources, before) for work in mine)
        tail = min(longest(work, targets, after) for work in mine)
        bounds.append(head + num_microbatches * sum(seconds[work] for work in mine) + tail)
    return max(bounds)


def least_idle_fraction(
    pipeline: Pipeline, num_microbatches: int, durations: Durations, style: Style
) -> float:
    """Mean idle share of the ranks that no order of the same instructions can go below."""
    work = sum(
        durations.of(Instruction(kind, stage, 0))
        for stage in range(pipeline.num_stages)
        for kind in stage_kinds(pipeline, stage, style)
    )
    least = least_makespan(pipeline, num_microbatches, durations, style)
    return 1 - num_microbatches * work / (pipeline.num_ranks * least)
