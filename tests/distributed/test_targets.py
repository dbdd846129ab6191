"""Every target resumes to the bit: six steps, and the last three of them again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deepmim_scale.runs.folder import read_metrics, step_folder

SCRIPT = Path(__file__).with_name("targets.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    generator = torch.Generator().manual_seed(0)
    (folder / "data" / "train" / "a").mkdir(parents=True)
    for number in range(16):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "data" / "train" / "a" / f"{number}.png")
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    words = [folder / "data", folder / "runs", folder / "teacher.safetensors"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "runs"


@pytest.mark.parametrize("target", ["hog", "timm", "ema"])
def test_resumes_to_the_bit(runs: Path, target: str) -> None:
    run = runs / target
    (aside,) = run.glob("checkpoints.before-*")
    first, again = aside / "step_00000006", step_folder(run, 6)
    names = {path.name for path in first.glob("*.safetensors")}
    assert names == {path.name for path in again.glob("*.safetensors")}
    assert ("objective_stage00.safetensors" in names) == (target == "ema")
    for name in names:
        ours, theirs = load_file(first / name), load_file(again / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"


@pytest.mark.parametrize("target", ["hog", "timm", "ema"])
def test_loss_falls(runs: Path, target: str) -> None:
    rows = read_metrics(runs / target)
    assert rows[-1]["loss"] < rows[0]["loss"], [row["loss"] for row in rows]
