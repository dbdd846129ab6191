"""Checkpoints go on in any other number of stages and replicas, optimizer included, exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("reshard.py")


def leg(method: str, stages: int, replicas: int, **more: Any) -> dict[str, Any]:
    return {"method": method, "stages": stages, "replicas": replicas, **more}


CHAINS = {
    "deepmim": [
        leg("deepmim", 2, 2),
        leg("deepmim", 1, 1),
        leg("deepmim", 4, 1, schedule="dib_w"),
        leg("deepmim", 1, 2, reduction="per_microbatch"),
    ],
    "mirl": [
        leg("mirl", 3, 1, placement="v"),
        leg("mirl", 1, 1),
        leg("mirl", 2, 1, schedule="1f1b"),
    ],
    # Weights in 16 bit with fp32 masters; one replica, since the sum over more rounds otherwise.
    "pure_bf16": [
        leg("deepmim", 2, 1, json="a100_pure_bf16"),
        leg("deepmim", 1, 1, json="a100_pure_bf16"),
        leg("deepmim", 3, 1, json="a100_pure_bf16", schedule="1f1b"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    (folder / "chains.json").write_text(json.dumps(CHAINS))
    path = os.pathsep.join(filter(None, sys.path))  # where free_port.py is found too
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(folder / "chains.json")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


LEGS = [(chain, number) for chain, legs in CHAINS.items() for number in range(1, len(legs))]


@pytest.mark.parametrize(("chain", "number"), LEGS)
def test_load_changes_no_bit(folder: Path, chain: str, number: int) -> None:
    saved = load_file(folder / chain / f"{number - 1}_saved.safetensors")
    loaded = load_file(folder / chain / f"{number}_loaded.safetensors")
    assert saved.keys() == loaded.keys()
    kinds = {key.split("/")[0] for key in saved}
    assert kinds == {"weight", "master", "exp_avg", "exp_avg_sq", "step"}
    for key, value in saved.items():
        assert torch.equal(value, loaded[key]), f"{key}: {value} saved, {loaded[key]} loaded"
    assert saved["step"].tolist() == [number, number]
    assert all(value.any() for key, value in saved.items() if key.startswith("exp_avg")), "zeros"


@pytest.mark.parametrize(("chain", "number"), LEGS)
def test_next_step_equals_the_uninterrupted_one(folder: Path, chain: str, number: int) -> None:
    before = load_file(folder / chain / f"{number}_loaded.safetensors")
    uninterrupted = load_file(folder / chain / f"{number - 1}_next.safetensors")
    resumed = load_file(folder / chain / f"{number}_saved.safetensors")
    weights = [key for key in uninterrupted if key.startswith(("weight/", "master/"))]
    moved = max((uninterrupted[key] - before[key]).abs().max().item() for key in weights)
    assert moved > 1e-3
    for key in weights:
        difference = (uninterrupted[key] - resumed[key]).abs().max().item()
        assert difference <= 1e-6, f"{key}: {difference}"
