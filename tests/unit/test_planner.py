"""Verdicts of the planner, pictures of schedules, and what plan/ imports."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deepmim_scale.config import ModelConfig
from deepmim_scale.methods import method_of
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.draw import chrome_trace, draw_gantt, timelines_of
from deepmim_scale.pipeline.ir import Kind
from deepmim_scale.pipeline.registry import build_schedule
from deepmim_scale.plan.cost import (
    gradient_traffic_bytes,
    model_cost,
    stage_cost,
    teacher_cost,
    zero2_state_bytes,
)
from deepmim_scale.plan.data_parallel import data_parallel_rows
from deepmim_scale.plan.hardware import GPUS, NETWORKS
from deepmim_scale.plan.messages import num_bytes, transfers_of
from deepmim_scale.plan.partition import format_layout
from deepmim_scale.plan.planner import enumerate_plans, predict, to_json
from deepmim_scale.plan.row import Cluster, Plan
from deepmim_scale.plan.timing import (
    layout_of,
    memory_of,
    pipeline_of,
    profiled_times,
    times_of,
)
from deepmim_scale.precision import Precision
from deepmim_scale.presets import load_preset


def model(preset: str, **changes: Any) -> ModelConfig:
    return load_preset(preset).model.replace(**changes)


def cluster(network: str, gpu: str = "v100-32g", nodes: int = 4) -> Cluster:
    return Cluster(nodes, 8, GPUS[gpu], NETWORKS[network])


def best_of(plans: list[Plan], stages: int, gather: str = "16bit") -> Plan:
    kind = (plan for plan in plans if plan.is_executed and (plan.stages > 1) == (stages > 1))
    return next(plan for plan in kind if plan.weight_gather == gather)


# 32 V100 in 4 nodes, 4096 images: is the best a pipeline?
VERDICTS = [
    ("deepmim_vit_b_48", "8xhdr", False),
    ("deepmim_vit_b_48", "edr", False),
    ("deepmim_vit_b_48", "25gbe", False),
    ("deepmim_vit_b_48", "10gbe", True),
    ("deepmim_vit_b_12", "edr", False),
]


@cache
def plans_of(preset: str, network: str) -> list[Plan]:
    return enumerate_plans(model(preset), cluster(network), 4096)


@pytest.mark.parametrize(("preset", "network", "pipeline"), VERDICTS)
def test_verdicts(preset: str, network: str, pipeline: bool) -> None:
    """Against data parallelism that hides all it can; with equal gathers on both sides."""
    plans = plans_of(preset, network)
    assert (plans[0].kind == "pipeline") == pipeline
    assert plans[0].is_executed
    if (preset, network) == ("deepmim_vit_b_48", "10gbe"):
        # The cards bound it: every image's state crosses each boundary twice.
        for gather, low, high in (("16bit", 1.1, 1.3), ("fp32", 1.6, 1.9)):
            both = [best_of(plans, stages, gather).step_seconds for stages in (1, 2)]
            assert low <= both[0] / both[1] <= high, (gather, both)
        cards = 2 * 4096 * 4 * 50 * 768 / 1.25e9
        assert cards < plans[0].step_seconds < 1.15 * cards


def test_data_parallelism_by_hand() -> None:
    """With nothing hidden a step is its compute and then its communication; ideally the larger."""
    whole = model_cost(model("deepmim_vit_b_48")).whole
    compute = 128 * whole.training_flops / (125e12 * 0.38 * 128 / 130)
    for gather, num_bytes_each in (("fp32", 2 + 4), ("16bit", 2 + 2)):
        rows = {
            row.overlap: row
            for row in data_parallel_rows(model("deepmim_vit_b_48"), cluster("25gbe"), 128, 1)
            if (row.kind, row.weights, row.recompute) == ("data_parallel", "autocast", "none")
            and row.weight_gather == gather
        }
        # 16-bit gradients to their owners, weights back, over the node's card.
        sent = 31 / 32 * num_bytes_each * whole.trainable
        for row in rows.values():
            assert row.reduction_bytes == pytest.approx(sent)
            assert row.reduction_seconds == pytest.approx(sent / 3.125e9)
            assert row.compute_seconds == pytest.approx(compute)
        assert rows["none"].step_seconds == pytest.approx(compute + sent / 3.125e9)
        assert rows["overlapped"].step_seconds == pytest.approx(max(compute, sent / 3.125e9))


def test_what_saves_memory() -> None:
    """Recomputing costs a forward pass; pure 16-bit weights and ZeRO-3 keep less."""
    config = model("deepmim_vit_b_48")
    cost = model_cost(config)
    rows = {
        (row.kind, row.weights, row.recompute): row
        for row in data_parallel_rows(config, cluster("edr"), 64, 2)
        if row.overlap == "none"
    }
    plain = rows["data_parallel", "autocast", "none"]
    again = rows["data_parallel", "autocast", "encoder"]
    share = 1 + cost.encoder.forward_flops / cost.whole.training_flops
    assert again.compute_seconds == pytest.approx(share * plain.compute_seconds)
    assert again.activation_bytes < 0.4 * plain.activation_bytes
    assert plain.memory_bytes == max(row.memory_bytes for row in rows.values())
    smallest = rows["zero3", "pure_16bit", "encoder"]
    assert smallest.memory_bytes == min(row.memory_bytes for row in rows.values())
    # Twice for each of 2 micro-batches the weights in 16 bits, and once the gradients.
    sent = 31 / 32 * (2 * 2 + 1) * 2 * cost.whole.trainable
    assert smallest.reduction_bytes == pytest.approx(sent)


def test_each_microbatch_may_reduce() -> None:
    """per_microbatch: gradients are sent for each of 4 micro-batches, weights once for all."""
    arguments = (model("deepmim_vit_b_12"), cluster("edr"), 1, "dib", 32, 4)
    once, often = (
        predict(*arguments, reduction=reduction) for reduction in ("coalesced", "per_microbatch")
    )
    assert often.reduction_bytes == pytest.approx((4 * 2 + 4) / (2 + 4) * once.reduction_bytes)
    assert often.memory_bytes < once.memory_bytes


def test_sums_hide_behind_the_last_micro_batch() -> None:
    """On one stage 90 % of a sum that takes as long as a backward pass lies beside it."""
    arguments = (model("deepmim_vit_b_12"), cluster("hdr"), 1, "dib", 64, 2)
    late, hidden = (predict(*arguments, reduction=r) for r in ("coalesced", "overlapped"))
    sums = gradient_traffic_bytes(model_cost(model("deepmim_vit_b_12")), 32) / 25e9
    assert late.step_seconds - hidden.step_seconds >= 0.89 * sums


def test_the_teacher_is_planned() -> None:
    """CLIP beside the decoders: its forward in time and cut, its weights in memory."""
    config = model("deepmim_clip_vit_b_12")
    teacher = teacher_cost(config)
    layout = layout_of(config, 4)
    times = times_of(config, layout, 8, 1e12).compute
    for index, stage in enumerate(layout):
        cost = stage_cost(config, stage.first, stage.last)
        seconds = 8e-12 * cost.decoders.training_flops
        taught = 8e-12 * teacher.forward_flops if stage.decoders else 0.0
        assert times["decoder", index] == pytest.approx(seconds + taught)
    deep = ModelConfig(**(config.model_dump() | {"depth": 48, "taps": "even"}))
    plain = deep.replace(target="pixel")
    assert format_layout(layout_of(deep, 8), deep) == "11/1d/11/1d/11/1d/11/1d"
    assert format_layout(layout_of(plain, 8), plain) == "9/3d/9/3d/9/3d/9/3d"
    with_teacher, without = (
        predict(m, cluster("8xhdr"), 1, "dib", 128, 1)
        for m in (config, config.replace(target="pixel"))
    )
    assert with_teacher.step_seconds > 1.3 * without.step_seconds
    student = model_cost(config).whole
    assert student.frozen < 10**6
    state = zero2_state_bytes(model_cost(config), 32)
    assert with_teacher.memory_bytes - with_teacher.activation_bytes == state
    assert state > 10 * student.trainable + 4 * 86_192_640


def test_memory_and_bytes_by_hand() -> None:
    config = model("deepmim_vit_b_12", taps=(3, 6, 9, 12))
    plan = predict(config, cluster("edr"), 4, "1f1b", 64, 8)
    assert (plan.replicas, plan.layout) == (8, "3d/3d/3d/3d")
    layout = layout_of(config, 4)
    memory = memory_of(config, layout, 64)
    # The first rank keeps 4 micro-batches, and room for the next gradient.
    kept = 4 * (memory[0].encoder + memory[0].decoders) + memory[0].messages["gradient"]
    assert plan.activation_bytes == kept
    # An inner stage sends activations down and gradients up.
    assert plan.boundary_bytes == 8 * 2 * 64 * num_bytes(
        method_of(config).boundary(config, 3), Precision.BFLOAT16
    )
    one = predict(config, cluster("edr"), 1, "dib", 128, 1, reduction="per_microbatch")
    state = zero2_state_bytes(model_cost(config), 32, "per_microbatch")
    assert one.memory_bytes == state + one.activation_bytes
    assert one.boundary_bytes == 0


@pytest.mark.parametrize("network", ["8xhdr", "25gbe"])
def test_long_steps_continue_at_the_slowest_rank(network: str) -> None:
    """48 micro-batches predicted from 24 against the simulation of all of them."""
    config = model("deepmim_vit_b_12", taps=(3, 6, 9, 12))
    for name in ("1f1b", "dib", "dib_w"):
        plan = predict(config, cluster(network), 4, name, 32, 48)
        layout = layout_of(config, 4)
        rate = 125e12 * 0.38 * 32 / 34
        # Every boundary is between two nodes, whose card 8 replicas share.
        times = times_of(
            config,
            layout,
            32,
            rate,
            lambda *_: 8 / (NETWORKS[network] * 1e9),
            lanes=lambda source, target: (f"out of {source}", f"into {target}"),
            split=name == "dib_w",
        )
        exact = build_schedule(
            name,
            SchedulingProblem(
                pipeline_of(config, layout), 48, times, memory_of(config, layout, 32), quick=True
            ),
        )
        assert plan.compute_seconds == pytest.approx(exact.timeline.makespan, rel=0.04), name


def test_the_cut_respects_the_memory() -> None:
    """Where the fastest cut is too large for the GPU, a slower one that fits is planned."""
    config = model("deepmim_vit_b_48")
    fastest = predict(config, cluster("8xhdr", "a100-80g"), 4, "1f1b", 64, 8)
    needs = fastest.memory_bytes / 2**30 / 0.9
    tight = replace(GPUS["a100-80g"], memory_gib=0.95 * needs)
    plan = predict(config, Cluster(4, 8, tight, 200.0), 4, "1f1b", 64, 8)
    assert plan.fits
    assert plan.layout != fastest.layout
    assert plan.step_seconds > fastest.step_seconds
    hopeless = replace(tight, memory_gib=4.0)
    assert not predict(config, Cluster(4, 8, hopeless, 200.0), 4, "1f1b", 64, 8).fits


def test_too_small_a_memory() -> None:
    plans = enumerate_plans(model("mirl_vit_b_48"), Cluster(1, 1, GPUS["v100-16g"], 1.0), 4096)
    assert plans[0].fits
    crowded = [plan for plan in plans if not plan.fits]
    assert all(plan.memory_bytes > 0.9 * 16 * 2**30 for plan in crowded)
    assert crowded
    assert to_json(crowded)["best"] is None


def test_messages_of_mirl() -> None:
    config = model("mirl_vit_b_48")
    found = {(m.payload, m.source, m.target) for m in transfers_of(config, layout_of(config, 3), 1)}
    assert ("prediction", 0, 2) in found
    assert ("prediction_gradient", 2, 0) in found
    assert not any(source == target for _, source, target in found)
    folded = layout_of(config, 3, "v")
    pipeline = pipeline_of(config, folded, "v")
    assert (len(folded), pipeline.num_ranks) == (6, 3)
    assert pipeline_of(config, layout_of(config, 1, "v"), "v").placement == "linear"


def test_times_from_a_profile() -> None:
    """Decoders take twice the prediction, in the profile as one kind, in the result as three."""
    config = model("deepmim_vit_b_12", taps=(3, 6, 9, 12))
    predicted = times_of(config, layout_of(config, 2), 8, 1e12)
    factor: dict[Kind, float] = {"forward": 1.5, "encoder_backward": 1.5, "decoder": 2.0}
    measured = {
        (kind, stage): scale * predicted.compute[kind, stage]
        for kind, scale in factor.items()
        for stage in (0, 1)
    }
    found = profiled_times(measured, predicted).compute
    for (kind, stage), seconds in predicted.compute.items():
        scale = 2.0 if kind.startswith("decoder") else 1.5
        assert found[kind, stage] == pytest.approx(scale * seconds), kind


def test_mirl_on_v_gains_over_folded_1f1b(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, whatever it is."""
    with capsys.disabled():
        for preset in ("mirl_vit_b_48", "mirl_vit_s_54"):
            config = model(preset)
            layout = layout_of(config, 3, "v")
            pipeline, memory = pipeline_of(config, layout, "v"), memory_of(config, layout, 1)
            gains = {}
            for microbatches in (3, 6, 12, 24):
                folded, dib = (
                    build_schedule(
                        name,
                        SchedulingProblem(
                            pipeline, microbatches, times_of(config, layout, 1, 1e12), memory
                        ),
                    )
                    for name in ("1f1b", "dib")
                )
                gains[microbatches] = round(folded.timeline.makespan / dib.timeline.makespan, 2)
            print(f"\n  {preset} on v-3, dib over folded 1f1b by micro-batches: {gains}", end="")
            assert min(gains.values()) > 1


def test_svg_of_the_v(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = model("debug_mirl")
    layout = layout_of(config, 3, "v")
    built = build_schedule(
        "dib",
        SchedulingProblem(
            pipeline_of(config, layout, "v"),
            3,
            times_of(config, layout, 8, 1e9),
            memory_of(config, layout, 8),
        ),
    )
    draw_gantt(built.timeline, tmp_path / "v.svg", "V")
    assert "deep stage" in (tmp_path / "v.svg").read_text()
    trace = chrome_trace({"built": built.timeline, "again": built.timeline})
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"thread_name", "forward 0", "wait for activation"} <= names
    read = timelines_of(json.loads(json.dumps(trace)))
    assert list(read) == ["built", "again"]
    for timeline in read.values():
        assert timeline.makespan == pytest.approx(built.timeline.makespan)
        assert timeline.busy == pytest.approx(built.timeline.busy)


def test_plan_imports_no_torch() -> None:
    plan = "cost hardware messages partition timing planner resolve commands schedule_command"
    pipeline = "ir builders list_scheduler registry compatibility files validate simulate draw"
    names = [f"plan.{name}" for name in plan.split()] + [f"pipeline.{n}" for n in pipeline.split()]
    code = "import sys\n" + "\n".join(f"import deepmim_scale.{name}" for name in names)
    code += "\nsys.exit(','.join({'torch', 'matplotlib', 'numpy'} & set(sys.modules)) or 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
