"""Rates fitted to traced steps: exact times give their coefficients back, and plans use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepmim_scale.cli import main
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.draw import MEASURED, chrome_trace
from deepmim_scale.pipeline.registry import build_schedule, find_schedule
from deepmim_scale.plan.calibrate import Sample, bandwidth_of, calibrated, fit, samples_of
from deepmim_scale.plan.cost import gradient_traffic_bytes, model_cost
from deepmim_scale.plan.hardware import GPUS
from deepmim_scale.plan.partition import format_layout
from deepmim_scale.plan.planner import predict
from deepmim_scale.plan.rates import Calibration, features
from deepmim_scale.plan.row import Cluster
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of
from deepmim_scale.presets import load_preset

CLUSTER = Cluster(1, 8, GPUS["a100-80g"], 12.5)
# Seconds per FLOP, per block, per image: decoders much slower than their FLOPs say.
TRUE = Calibration(
    {
        ("forward", False): (1e-13, 1e-4, 1e-5),
        ("decoder", False): (9e-13, 2e-4, 0.0),
        ("encoder_backward", False): (2e-13, 0.0, 3e-5),
    },
    {False: 2e-13, True: 9e-13},
)


def deep(depth: int) -> ModelConfig:
    return load_preset("deepmim_vit_b_12").model.replace(depth=depth, taps="even")


def write_run(folder: Path, depth: int, schedule: str = "dib", stages: int = 1) -> RunConfig:
    """A run whose traced step took what TRUE says."""
    config = RunConfig(model=deep(depth), microbatch_size=32, stages=stages, reduction="coalesced")
    layout = layout_of(config.model, stages)
    split = find_schedule(schedule).split_backward
    times = times_of(config.model, layout, 32, 1.0, split=split, calibration=TRUE)
    problem = SchedulingProblem(
        pipeline_of(config.model, layout), 4, times, memory_of(config.model, layout, 32)
    )
    timeline = build_schedule(schedule, problem).timeline
    content = chrome_trace({MEASURED: timeline}) | {
        "step": 3,
        "layout": format_layout(layout, config.model),
        "split_backward": split,
        "precision": "bfloat16",
        "num_replicas": 4,
        "num_hosts": 1,
        "reduction_seconds": 0.5,
    }
    folder.mkdir()
    (folder / "trace_step_00000003.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(config.model_dump_json())
    return config


def test_exact_times_are_predicted_at_other_depths(tmp_path: Path) -> None:
    samples = []
    for depth in (6, 24):
        run = tmp_path / str(depth)
        config = write_run(run, depth)
        samples += samples_of(json.loads((run / "trace_step_00000003.json").read_text()), config)
    found = fit(samples)
    for depth in (12, 36, 48):
        model = deep(depth)
        expected = TRUE.whole(model, 0, depth, 32)
        assert found.whole(model, 0, depth, 32) == pytest.approx(expected, rel=1e-6)


def test_stages_and_micro_batches_tell_coefficients_apart() -> None:
    samples = [
        Sample("forward", False, values, TRUE.seconds("forward", False, values))
        for depth in (6, 12, 24)
        for size in (8, 64)
        for first in (0, 3)
        for values in [features(deep(depth), first, depth, size, split=False)["forward"]]
    ]
    decoder = features(deep(6), 0, 6, 8, split=False)["decoder"]
    samples.append(Sample("decoder", False, decoder, 1.0))
    assert fit(samples).coefficients["forward", False] == pytest.approx(
        TRUE.coefficients["forward", False], rel=1e-6
    )


@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(1, 100), st.floats(1, 100)), min_size=1))
def test_coefficients_are_never_negative(rows: list[tuple[float, float, float]]) -> None:
    samples = [Sample("decoder", False, row, 1.0) for row in rows]
    samples.append(Sample("forward", False, (1.0, 1.0, 1.0), 1.0))
    found = fit(samples)
    assert all(value >= 0 for each in found.coefficients.values() for value in each)
    assert all(found.seconds("decoder", False, row) >= 0 for row in rows)


def test_kinds_that_no_run_executed_follow_their_part() -> None:
    """Decoders of TRUE take 9 times the encoder's time for a FLOP."""
    values = features(deep(12), 0, 12, 32, split=True)
    for kind, part in (("decoder_forward", True), ("encoder_weight_gradient", False)):
        expected = values[kind][0] * TRUE.seconds_per_flop[part]
        assert TRUE.seconds(kind, True, values[kind]) == pytest.approx(expected)
    # A backward to the inputs alone runs at the rate of the whole one.
    backward = values["encoder_backward"]
    assert TRUE.seconds("encoder_backward", True, backward) == pytest.approx(
        2e-13 * backward[0] + 3e-5 * 32
    )


def test_a_measured_ratio_moves_the_cut() -> None:
    model = deep(48)
    layouts = [
        predict(model, cluster, 8, "dib", 64, 8).layout
        for cluster in (CLUSTER, replace(CLUSTER, calibration=TRUE))
    ]
    assert layouts[0] != layouts[1]
    cut = layout_of(model, 8, seconds=lambda a, b: TRUE.whole(model, a, b, 64))
    slowest = [
        max(TRUE.whole(model, stage.first, stage.last, 64) for stage in layout)
        for layout in (cut, layout_of(model, 8))
    ]
    assert slowest[0] < slowest[1]


def test_bandwidth_is_that_of_sums_with_nothing_beside_them(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", 12)
    trace = json.loads((tmp_path / "run/trace_step_00000003.json").read_text())
    sent = gradient_traffic_bytes(model_cost(config.model), 4)
    assert bandwidth_of(trace, config) == pytest.approx(sent / 0.5 / 1e9)
    assert bandwidth_of(trace | {"precision": "fp32"}, config) == pytest.approx(2 * sent / 5e8)
    assert bandwidth_of(trace, config.replace(reduction="overlapped")) is None
    assert bandwidth_of(trace | {"num_replicas": 1}, config) is None
    cluster = calibrated(CLUSTER, [str(tmp_path / "run")])
    assert cluster.gpu.intra_gbytes == pytest.approx(sent / 0.5 / 1e9)


def test_plan_by_measured_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for depth, schedule, stages in ((12, "dib", 1), (24, "dib", 1), (24, "dib_w", 4)):
        runs.append(str(tmp_path / f"{depth}_{schedule}"))
        write_run(Path(runs[-1]), depth, schedule, stages)
    words = [
        "--preset",
        "deepmim_vit_b_48",
        "--gpus-per-node",
        "2",
        "--json",
        str(tmp_path / "p.json"),
    ]
    main(["plan", *words, "--calibrate", ",".join(runs)])
    told = capsys.readouterr().out
    assert "measured rates" in told
    assert "encoder_backward (inputs)" in told
    rows = json.loads((tmp_path / "p.json").read_text())["plans"]
    plain = next(r for r in rows if r["kind"] == "data_parallel" and r["microbatch"] == 32)
    model = load_preset("deepmim_vit_b_48").model
    expected = plain["microbatches"] * TRUE.whole(model, 0, 48, 32)
    assert plain["compute_seconds"] == pytest.approx(expected, rel=1e-3)


def test_runs_that_cannot_calibrate(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 12)
    (tmp_path / "run/trace_step_00000003.json").unlink()
    with pytest.raises(UserError, match="has no traced step; train with --trace N"):
        calibrated(CLUSTER, [str(tmp_path / "run")])
    with pytest.raises(UserError, match="none"):
        calibrated(CLUSTER, [str(tmp_path / "none")])
