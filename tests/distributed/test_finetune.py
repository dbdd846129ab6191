"""Fine-tuning in 1, 2 and 3 processes: equal bits after a stop, exact counts, 28 groups."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from free_port import free_port
from PIL import Image

SCRIPT = Path(__file__).with_name("finetune_runs.py")
VALIDATION_IMAGES = 977


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy colors: 24 training images, 977 for validation."""
    root, random = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", VALIDATION_IMAGES)):
        for number in range(count):
            kind = number % 3
            path = root / "data" / split / "abc"[kind] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = 128 + 40 * np.eye(3)[kind] + random.normal(0, 60, (20, 20, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


def launch(folder: Path, processes: int) -> dict[str, Any]:
    command = ["torchrun", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(folder / "data")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / f"{processes}.json").read_text())
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return launch(folder, 1)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return launch(folder, 2)


def test_interrupted_ends_as_uninterrupted(one: dict[str, Any]) -> None:
    """With decoding in two more processes on top, which must not matter either."""
    assert one["began after"] == 4
    assert one["kinds"] == ["objective_stage00", "optimizer_stage00", "weights_stage00"]
    assert one["equal bits"]
    assert one["equal rows"]
    assert one["equal files"]


def test_goes_on_with_two_processes(two: dict[str, Any]) -> None:
    assert two["began after"] == 4
    assert two["difference"] <= 1e-5


def test_a_probe_in_two_processes_is_that_of_one(two: dict[str, Any]) -> None:
    assert two["probe"] <= 1e-5


def test_zero_with_28_groups(two: dict[str, Any]) -> None:
    assert two["28 groups"] <= 5e-6


def same_counts(one: dict[str, Any], other: dict[str, Any]) -> None:
    right, likeliest, loss, images = one["counts"]
    assert images == VALIDATION_IMAGES
    assert 0 < right < likeliest == images, "top-3 of three classes is all"
    assert other["counts"] == [right, likeliest, pytest.approx(loss, rel=1e-6), images]


def test_counts_of_two_processes_are_exact(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal predictions for every image, however they are shared out."""
    same_counts(one, two)


@pytest.mark.soak
def test_counts_of_three_processes_are_exact(folder: Path, one: dict[str, Any]) -> None:
    same_counts(one, launch(folder, 3))
