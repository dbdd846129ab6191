"""Fits the planner's rates to traced steps of runs (`--trace N`), with least squares.

Each kind of instruction has its own coefficients of 0 or more (`rates.py`). Errors are relative, so
that short instructions count as much as long ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json
from deepmim_scale.pipeline.draw import MEASURED, timelines_of
from deepmim_scale.pipeline.ir import COMPUTE_KINDS, Kind
from deepmim_scale.plan.cost import gradient_traffic_bytes, stage_cost
from deepmim_scale.plan.partition import parse_layout
from deepmim_scale.plan.rates import Calibration, Features, Split, features, is_decoder
from deepmim_scale.plan.row import Cluster
from deepmim_scale.runs.folder import TRACES, load_run_config


@dataclass(frozen=True)
class Sample:
    """What one kind of instruction took on one stage of a run."""

    kind: Kind
    split: Split
    features: Features
    seconds: float


def traces_of(run: str) -> tuple[RunConfig, list[dict[str, Any]]]:
    """A run and its traced steps; UserError where there are none."""
    config = load_run_config(run)
    found = [read_json(file) for file in sorted(Path(run).glob(TRACES))]
    if not found:
        raise UserError(f"calibrate={run}: has no traced step; train with --trace N")
    return config, found


def calibrated(cluster: Cluster, runs: Sequence[str]) -> Cluster:
    """The cluster with the rates, and where a run shows it the bandwidth, of measured runs."""
    samples: list[Sample] = []
    for run in runs:
        config, traces = traces_of(run)
        for trace in traces:
            samples += samples_of(trace, config)
            bandwidth = bandwidth_of(trace, config)
            if bandwidth is None:
                continue
            if trace["num_hosts"] > 1:
                cluster = replace(cluster, network_gbytes=bandwidth)
            else:
                cluster = replace(cluster, gpu=replace(cluster.gpu, intra_gbytes=bandwidth))
    return replace(cluster, calibration=fit(samples))


def bandwidth_of(trace: Mapping[str, Any], config: RunConfig) -> float | None:
    """GB/s of each rank while it sums gradients, where nothing lies beside the sums."""
    replicas = trace["num_replicas"]
    if config.reduction != "coalesced" or replicas == 1:
        return None
    costs = [
        stage_cost(config.model, cut.first, cut.last)
        for cut in parse_layout(trace["layout"], config.model)
    ]
    # The planner's bytes are those of 16-bit gradients.
    wide = 2 if trace["precision"] == "fp32" else 1
    sent = max(gradient_traffic_bytes(cost, replicas) for cost in costs) * wide
    return float(sent / trace["reduction_seconds"] / 1e9)


def samples_of(trace: Mapping[str, Any], config: RunConfig) -> list[Sample]:
    """The median of each kind and stage of a traced step."""
    layout, split = parse_layout(trace["layout"], config.model), trace["split_backward"]
    found: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for event in timelines_of(trace)[MEASURED].events:
        step = event.instruction
        if step.kind in COMPUTE_KINDS:
            found[step.kind, step.stage].append(event.end - event.start)
    each = [
        features(config.model, cut.first, cut.last, config.microbatch_size, split) for cut in layout
    ]
    return [
        Sample(kind, split, each[stage][kind], median(seconds))
        for (kind, stage), seconds in found.items()
    ]


def fit(samples: Sequence[Sample]) -> Calibration:
    """Coefficients of every kind; UserError without a sample of encoder and decoders."""
    by_kind: dict[tuple[Kind, Split], list[Sample]] = defaultdict(list)
    totals = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for sample in samples:
        by_kind[sample.kind, sample.split].append(sample)
        total = totals[is_decoder(sample.kind)]
        total[0] += sample.seconds
        total[1] += sample.features[0]
    if not all(flops for _, flops in totals.values()):
        raise UserError("calibrate: the traces hold no decoder; trace a whole training step")
    return Calibration(
        {key: _fit_kind(some) for key, some in by_kind.items()},
        {part: seconds / flops for part, (seconds, flops) in totals.items()},
    )


def _fit_kind(samples: Sequence[Sample]) -> Features:
    """Least squares of relative errors with coefficients of 0 or more.

    Of the fits that are equally good the first is taken: FLOPs before blocks before images.
    """
    import numpy as np  # here: commands that fit nothing start without it

    # Relative errors: every sample's time becomes 1.
    rows = np.array([sample.features for sample in samples])
    rows /= np.array([[sample.seconds] for sample in samples])
    best, least = np.zeros(3), np.inf
    # Three coefficients have seven sets of those that are not 0; the best of them is the solution.
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            columns = rows[:, chosen]
            scale = columns.max(axis=0)
            found, *_ = np.linalg.lstsq(columns / scale, np.ones(len(rows)), rcond=None)
            error = float(np.square(columns / scale @ found - 1).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[list(chosen)] = found / scale
    a, b, c = map(float, best)
    return a, b, c
