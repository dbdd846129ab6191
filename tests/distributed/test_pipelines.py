"""Pipelines of real gloo processes against plain PyTorch, and against one stage bit for bit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from free_port import free_port
from safetensors.torch import load_file

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.pipeline.compatibility import check_combination

SCRIPT = Path(__file__).with_name("pipelines.py")
METHODS = ("mae", "deepmim", "mirl")
SCHEDULES = ("gpipe", "1f1b", "dib", "dib_w")
REDUCTIONS = ("coalesced", "per_microbatch")
# Processes -> stages; the rest are replicas (one or two).
WORLDS = {1: (1,), 2: (1, 2), 3: (3,), 4: (2, 4), 6: (3, 6)}
CLIP = 0.2

Case = dict[str, Any]
Run = Callable[[int, dict[str, Case]], tuple[dict[str, Any], dict[str, torch.Tensor]]]


def is_legal(case: Case) -> bool:
    model = ModelConfig(method=case["method"], depth=6)
    try:
        check_combination(
            model, case["stages"], case["schedule"], case["placement"], case["reduction"]
        )
    except UserError:
        return False
    return True


def legal_cases(world: int, *, thorough: bool) -> dict[str, Case]:
    cases = {}
    for method, stages, placement, schedule, reduction in product(
        METHODS, WORLDS[world], ("linear", "v"), SCHEDULES, REDUCTIONS
    ):
        case = {
            "method": method,
            "stages": stages,
            "placement": placement,
            "schedule": schedule,
            "reduction": reduction,
            "microbatches": 4,
            "compare": False,
            "alone": f"{method} 1x{world // stages} linear dib {reduction}",
        }
        if not is_legal(case) or (stages == 1 and (placement == "v" or schedule != "dib")):
            continue
        # Every schedule with coalesced; strict ZeRO-2 with one of them unless all are asked for.
        quick = reduction == "coalesced" or schedule == "dib"
        if stages == 1 or thorough or quick:
            cases[f"{method} {stages}x{world // stages} {placement} {schedule} {reduction}"] = case
    return cases


def other_cases(world: int) -> dict[str, Case]:
    """Other targets, a user's own method, target and schedule, and schedules read from files."""
    names = ("placement", "schedule", "microbatches", "compare")
    base: Case = dict(zip(names, ("linear", "dib", 4, False), strict=True)) | {"stages": world}
    cases: dict[str, Case] = {}
    for kind in ("hog", "timm", "toys"):
        own = "twos" if kind == "toys" else "dib_w"
        for schedule in ("dib", own) if world == 2 else ("dib",):
            case = base | {"method": kind, "schedule": schedule, "alone": f"{kind} 1 dib"}
            cases[f"{kind} {world} {schedule}"] = case
    if world == 2:
        for file in ("by_hand", "zb_h1"):
            alone = {"method": "deepmim", "alone": "deepmim 1x1 linear dib coalesced"}
            cases[f"file {file}"] = base | alone | {"file": file}
    if world == 3:
        alone = {"method": "mirl", "alone": "mirl 1x1 linear dib coalesced"}
        cases["file on the V"] = base | alone | {"file": "1f1b", "placement": "v"}
    return cases


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run cases in `world` processes; results and parameters by case."""

    def launch(
        world: int, cases: dict[str, Case]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        (folder / "cases.json").write_text(json.dumps(cases))
        command = ["torchrun", "--nproc_per_node", str(world), "--master_port", str(free_port())]
        done = subprocess.run(
            [*command, str(SCRIPT), str(folder / "out"), str(folder / "cases.json")],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "out.json").read_text()), load_file(folder / "out.safetensors")

    return launch


def check_bit_equality(run: Run, *, thorough: bool) -> None:
    """Clipping off, one or two replicas: every pipeline's parameters equal one stage's."""
    found, checked = {}, 0
    for world in WORLDS:
        cases = legal_cases(world, thorough=thorough)
        if world <= 4:
            cases |= other_cases(world)
        results, tensors = run(world, cases)
        for name, case in cases.items():
            found[name] = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/") and "pos_embed" not in key
            }
            counted, expected = results[name]["bytes"]
            assert counted == expected, f"{name}: bytes sent {counted}, formula {expected}"
            alone = case["alone"]
            assert found[name].keys() == found[alone].keys()
            for key, value in found[alone].items():
                assert torch.equal(found[name][key], value), f"{name}: {key} differs"
            checked += case["stages"] > 1
    assert checked > 40


def test_every_pipeline_equals_one_stage_bit_for_bit(run: Run) -> None:
    check_bit_equality(run, thorough=False)


@pytest.mark.soak
def test_every_legal_combination_equals_one_stage_bit_for_bit(run: Run) -> None:
    check_bit_equality(run, thorough=True)


# (world, stages, method, placement, schedule, reduction, micro-batches), clipping active
AGAINST_TORCH = [
    (4, 2, "deepmim", "linear", "1f1b", "coalesced", 8),
    (4, 2, "deepmim", "linear", "dib", "per_microbatch", 4),
    (4, 2, "mae", "linear", "dib", "coalesced", 4),
    (4, 4, "deepmim", "linear", "dib_w", "coalesced", 8),
    (6, 3, "deepmim", "linear", "dib", "coalesced", 4),
    (6, 3, "deepmim", "linear", "gpipe", "per_microbatch", 4),
    (6, 6, "mirl", "linear", "1f1b", "coalesced", 4),
    (6, 3, "mirl", "v", "dib", "coalesced", 4),
    (6, 3, "mirl", "v", "1f1b", "per_microbatch", 4),
    (6, 3, "mirl", "linear", "dib", "coalesced", 4),
    (4, 2, "mirl", "linear", "gpipe", "coalesced", 4),
    (6, 2, "deepmim", "linear", "dib", "coalesced", 4),
]


@pytest.mark.parametrize("world", [4, 6])
def test_equals_plain_torch_with_clipping(run: Run, world: int) -> None:
    keys = ("stages", "method", "placement", "schedule", "reduction", "microbatches")
    cases = {}
    for size, *values in AGAINST_TORCH:
        if size == world:
            name = " ".join(map(str, values))
            cases[name] = dict(zip(keys, values, strict=True)) | {"clip": CLIP}
    results, _ = run(world, cases)
    for name, result in results.items():
        assert result["difference"] <= 5e-7, f"{name}: {result}"
        assert all("pos_embed" in key for key in result["missing"]), name
        norms, expected = result["norms"]
        assert min(expected) > CLIP, "clipping must be active"
        assert norms == pytest.approx(expected, rel=1e-6), name
        assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-6), name


def test_three_replicas(run: Run) -> None:
    """gloo's sums then depend on buckets: gradients before the reduction are equal, weights close.

    The parameters of two stages are compared with plain torch in AGAINST_TORCH.
    """
    base = {"method": "deepmim", "microbatches": 4, "compare": False, "keep_gradients": True}
    _, alone = run(3, {"case": base | {"stages": 1, "schedule": "dib"}})
    _, piped = run(6, {"case": base | {"stages": 2, "schedule": "dib_w"}})
    gradients = [key for key in alone if "/gradient" in key]
    assert len({key.split(".")[0] for key in gradients}) == 3
    for key, value in alone.items():
        if "pos_embed" in key:
            continue
        if key in gradients:
            assert torch.equal(piped[key], value), key
        torch.testing.assert_close(piped[key], value, rtol=0, atol=5e-7, msg=key)


def test_recomputation_changes_nothing(run: Run) -> None:
    base = {
        "method": "deepmim",
        "stages": 2,
        "schedule": "dib",
        "microbatches": 4,
        "compare": False,
    }
    names = ("none", "encoder", "all")
    cases = {name: base | {"recompute": name} for name in names}
    cases |= {f"{n} split": c | {"schedule": "dib_w"} for n, c in list(cases.items())}
    _, tensors = run(2, cases)
    for key, value in tensors.items():
        if key.startswith("none/"):
            for name in cases:
                assert torch.equal(tensors[key.replace("none/", f"{name}/", 1)], value), name


def test_pair_predictions_stay_home_on_the_v(run: Run) -> None:
    base = {"method": "mirl", "stages": 3, "schedule": "dib", "microbatches": 4, "compare": False}
    cases = {placement: base | {"placement": placement} for placement in ("v", "linear")}
    results, _ = run(3, cases)
    assert set(results["v"]["bytes"][0]) == {"activation", "gradient"}
    assert "prediction" in results["linear"]["bytes"][0]


def test_local_gradient_flow_sends_no_gradient(run: Run) -> None:
    case = {
        "method": "deepmim",
        "stages": 2,
        "schedule": "dib",
        "microbatches": 4,
        "gradient_flow": "local",
        "layout": "2d1d|2d1d",
        "compare": False,
    }
    results, _ = run(2, {"local": case})
    assert set(results["local"]["bytes"][0]) == {"activation"}


PRECISIONS = ("a100_bf16", "v100_fp16", "a100_pure_bf16", "v100_pure_fp16")


def test_precisions(run: Run) -> None:
    """16-bit pipelines equal one stage of the same precision, and autocast equals plain torch."""
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for world in (1, 2):
        cases = {}
        for method, name in product(("deepmim", "mirl"), PRECISIONS):
            schedules = ("dib",) if world == 1 or method == "mirl" else ("dib", "dib_w", "1f1b")
            for schedule in schedules:
                cases[f"{method} {name} {schedule}"] = {
                    "method": method,
                    "stages": world,
                    "schedule": schedule,
                    "microbatches": 4,
                    "json": name,
                    "compare": False,
                }
        for name in PRECISIONS[:2]:
            cases[f"torch {name}"] = {
                "method": "deepmim",
                "stages": world,
                "schedule": "dib",
                "microbatches": 4,
                "json": name,
            }
        results, tensors[world] = run(world, cases)
        for name, result in results.items():
            counted, expected = result["bytes"]
            assert counted == expected, f"{name}: bytes sent {counted}, formula {expected}"
            if name.startswith("torch"):
                assert result["difference"] <= 2e-3, f"{name}: {result}"
                assert result["norms"][0] == pytest.approx(result["norms"][1], rel=1e-3)
    for key, value in tensors[2].items():
        name, parameter = key.split("/")
        if "pos_embed" not in parameter:
            method, settings, _ = f"{name} dib".split(" ", 2)
            alone = f"{name}/" if method == "torch" else f"{method} {settings} dib/"
            assert torch.equal(tensors[1][alone + parameter], value), key


def test_a_loss_that_is_not_finite_skips_the_step_everywhere(run: Run) -> None:
    """One replica's, on one stage; the next step is applied, so no weight was spoilt."""
    base = {
        "method": "deepmim",
        "stages": 2,
        "schedule": "dib",
        "microbatches": 4,
        "compare": False,
        "steps": 3,
        "infinite_stage": 1,
    }
    results, _ = run(
        4,
        {
            f"{name} {factor}": base | {"json": name, "factor": factor}
            for name, factor in product(("cpu_fp32", *PRECISIONS), ("inf", "nan"))
        },
    )
    for name, result in results.items():
        votes = result["votes"]
        assert all(vote == votes[0] for vote in votes), f"{name}: ranks disagree: {votes}"
        applied, scales = votes[0]
        assert applied == [True, False, True], name
        assert scales == ([65536.0, 32768.0, 32768.0] if "fp16" in name else [1.0] * 3), name
