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
REDUCTIONS = ("overlapped", "coalesced", "per_microbatch")
# Processes -> stages; the rest are replicas (one or two).
WORLDS = {1: (1,), 2: (1, 2), 3: (3,), 4: (2, 4), 6: (3, 6)}
CLIP = 0.2

Case = dict[str, Any]
Found = tuple[dict[str, Any], dict[str, torch.Tensor]]
Run = Callable[[int, dict[str, Case]], Found]


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
        # Every schedule as it runs by default; the other two with one unless all are asked for.
        quick = reduction == "overlapped" or schedule == "dib"
        if stages == 1 or thorough or quick:
            cases[f"{method} {stages}x{world // stages} {placement} {schedule} {reduction}"] = case
    return cases


def other_cases(world: int) -> dict[str, Case]:
    """Other targets and images, a user's method, target and schedule, schedules from files."""
    names = ("placement", "schedule", "microbatches", "compare")
    base: Case = dict(zip(names, ("linear", "dib", 4, False), strict=True)) | {"stages": world}
    cases: dict[str, Case] = {}
    for kind in ("hog", "timm", "toys", "deep"):
        own = "twos" if kind == "toys" else "dib_w"
        for schedule in ("dib", own) if world == 2 else ("dib",):
            case = base | {"method": kind, "schedule": schedule, "alone": f"{kind} 1 dib"}
            cases[f"{kind} {world} {schedule}"] = case
    if world == 2:
        for file in ("by_hand", "zb_h1"):
            alone = {"method": "deepmim", "alone": "deepmim 1x1 linear dib overlapped"}
            cases[f"file {file}"] = base | alone | {"file": file}
    if world == 3:
        alone = {"method": "mirl", "alone": "mirl 1x1 linear dib overlapped"}
        cases["file on the V"] = base | alone | {"file": "1f1b", "placement": "v"}
    return cases


class Launches:
    """Cases of all tests, run in one launch of processes for each number of them."""

    def __init__(self, folder: Path, cases: dict[int, dict[str, Case]]) -> None:
        self._folder, self._cases = folder, cases
        self._found: dict[int, Found] = {}

    def __call__(self, world: int, cases: dict[str, Case]) -> Found:
        """Results and parameters by case."""
        if world not in self._found:
            self._found[world] = self._launch(world, self._cases[world])
        results, tensors = self._found[world]
        for name, case in cases.items():
            assert self._cases[world][name] == case, f"{name}: missing in CASES"
        return {name: results[name] for name in cases}, {
            key: value for key, value in tensors.items() if key.split("/")[0] in cases
        }

    def _launch(self, world: int, cases: dict[str, Case]) -> Found:
        folder = self._folder / f"world{world}"
        folder.mkdir()
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The cases of every test here; importing torch and DeepSpeed takes longer than most."""
    cases: dict[int, dict[str, Case]] = {}
    for part in (bit_cases(thorough=False), clipped_cases(), *OTHER_CASES):
        for world, some in part.items():
            cases.setdefault(world, {}).update(some)
    return Launches(tmp_path_factory.mktemp("pipelines"), cases)


@pytest.fixture
def run_all(tmp_path: Path) -> Launches:
    """Every legal combination."""
    return Launches(tmp_path, bit_cases(thorough=True))


def bit_cases(*, thorough: bool) -> dict[int, dict[str, Case]]:
    """By number of processes."""
    return {
        world: legal_cases(world, thorough=thorough) | (other_cases(world) if world <= 4 else {})
        for world in WORLDS
    }


def check_bit_equality(run: Run, *, thorough: bool) -> None:
    """Clipping off, one or two replicas: every pipeline's parameters equal one stage's."""
    found, checked = {}, 0
    for world, cases in bit_cases(thorough=thorough).items():
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
def test_every_legal_combination_equals_one_stage_bit_for_bit(run_all: Run) -> None:
    check_bit_equality(run_all, thorough=True)


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


def clipped_cases() -> dict[int, dict[str, Case]]:
    """AGAINST_TORCH by number of processes."""
    keys = ("stages", "method", "placement", "schedule", "reduction", "microbatches")
    cases: dict[int, dict[str, Case]] = {}
    for size, *values in AGAINST_TORCH:
        case = dict(zip(keys, values, strict=True)) | {"clip": CLIP}
        cases.setdefault(size, {})[" ".join(map(str, values))] = case
    return cases


@pytest.mark.parametrize("world", [4, 6])
def test_equals_plain_torch_with_clipping(run: Run, world: int) -> None:
    cases = clipped_cases()[world]
    results, _ = run(world, cases)
    for name, result in results.items():
        assert result["difference"] <= 5e-7, f"{name}: {result}"
        assert all("pos_embed" in key for key in result["missing"]), name
        norms, expected = result["norms"]
        assert min(expected) > CLIP, "clipping must be active"
        assert norms == pytest.approx(expected, rel=1e-6), name
        assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-6), name


_DIB: Case = {"microbatches": 4, "compare": False, "schedule": "dib"}
_KEPT = _DIB | {"method": "deepmim", "keep_gradients": True}
THREE_REPLICAS = {
    3: {"three alone": _KEPT | {"stages": 1}},
    6: {"three in two stages": _KEPT | {"stages": 2, "schedule": "dib_w"}},
}


def test_three_replicas(run: Run) -> None:
    """gloo's sums then depend on buckets: gradients before the reduction are equal, weights close.

    The parameters of two stages are compared with plain torch in AGAINST_TORCH.
    """
    found = [
        {key.split("/")[1]: value for key, value in run(world, cases)[1].items()}
        for world, cases in THREE_REPLICAS.items()
    ]
    alone, piped = found
    gradients = [key for key in alone if key.startswith("gradient")]
    assert len({key.split(".")[0] for key in gradients}) == 3
    for key, value in alone.items():
        if "pos_embed" in key:
            continue
        if key in gradients:
            assert torch.equal(piped[key], value), key
        torch.testing.assert_close(piped[key], value, rtol=0, atol=5e-7, msg=key)


RECOMPUTED: dict[int, dict[str, Case]] = {
    2: {
        f"recompute {name} {schedule}": _DIB
        | {"method": "deepmim", "stages": 2, "schedule": schedule, "recompute": name}
        for name, schedule in product(("none", "encoder", "all"), ("dib", "dib_w"))
    }
}


def test_recomputation_changes_nothing(run: Run) -> None:
    _, tensors = run(2, RECOMPUTED[2])
    for key, value in tensors.items():
        if key.startswith("recompute none dib/"):
            for name in RECOMPUTED[2]:
                other = tensors[key.replace("recompute none dib/", f"{name}/", 1)]
                assert torch.equal(other, value), name


HOME: dict[int, dict[str, Case]] = {
    3: {
        f"pairs on {placement}": _DIB | {"method": "mirl", "stages": 3, "placement": placement}
        for placement in ("v", "linear")
    }
}


def test_pair_predictions_stay_home_on_the_v(run: Run) -> None:
    results, _ = run(3, HOME[3])
    assert set(results["pairs on v"]["bytes"][0]) == {"activation", "gradient"}
    assert "prediction" in results["pairs on linear"]["bytes"][0]


LOCAL: dict[int, dict[str, Case]] = {
    2: {
        "local flow": _DIB
        | {"method": "deepmim", "stages": 2, "gradient_flow": "local", "layout": "2d1d|2d1d"}
    }
}


def test_local_gradient_flow_sends_no_gradient(run: Run) -> None:
    results, _ = run(2, LOCAL[2])
    assert set(results["local flow"]["bytes"][0]) == {"activation"}


PRECISIONS = ("a100_bf16", "v100_fp16", "a100_pure_bf16", "v100_pure_fp16")


def precision_cases() -> dict[int, dict[str, Case]]:
    """Each precision on one stage and on two, and autocast beside plain torch."""
    cases: dict[int, dict[str, Case]] = {1: {}, 2: {}}
    for world, method, name in product(cases, ("deepmim", "mirl"), PRECISIONS):
        schedules = ("dib",) if world == 1 or method == "mirl" else ("dib", "dib_w", "1f1b")
        for schedule in schedules:
            case = _DIB | {"method": method, "stages": world, "schedule": schedule, "json": name}
            cases[world][f"{method} {name} {schedule}"] = case
    for world, name in product(cases, PRECISIONS[:2]):
        case = _DIB | {"method": "deepmim", "stages": world, "json": name, "compare": True}
        cases[world][f"torch {name}"] = case
    return cases


def test_precisions(run: Run) -> None:
    """16-bit pipelines equal one stage of the same precision, and autocast equals plain torch."""
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for world, cases in precision_cases().items():
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


SPOILT: dict[int, dict[str, Case]] = {
    4: {
        f"{factor} with {name}": _DIB
        | {"method": "deepmim", "stages": 2, "steps": 3, "infinite_stage": 1}
        | {"json": name, "factor": factor}
        for name, factor in product(("cpu_fp32", *PRECISIONS), ("inf", "nan"))
    }
}


def test_a_loss_that_is_not_finite_skips_the_step_everywhere(run: Run) -> None:
    """One replica's, on one stage; the next step is applied, so no weight was spoilt."""
    results, _ = run(4, SPOILT[4])
    for name, result in results.items():
        votes = result["votes"]
        assert all(vote == votes[0] for vote in votes), f"{name}: ranks disagree: {votes}"
        applied, scales = votes[0]
        assert applied == [True, False, True], name
        assert scales == ([65536.0, 32768.0, 32768.0] if "fp16" in name else [1.0] * 3), name


# What the fixture runs beside the cases of bit equality and of clipping.
OTHER_CASES = (THREE_REPLICAS, RECOMPUTED, HOME, LOCAL, precision_cases(), SPOILT)
