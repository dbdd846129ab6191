"""CLIP features as targets, with a small open_clip model of random weights; nothing is fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from deepmim_scale.analysis.reconstruct import validation
from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.evaluate.features import load_model
from deepmim_scale.images import normalize
from deepmim_scale.objectives.clip_teacher import load_teacher
from deepmim_scale.runs.folder import load_run_config, read_metrics

ROOT = Path(__file__).resolve().parents[2]
SIZE, PATCH, WIDTH = 32, 8, 24
FITS = ModelConfig(target="clip", img_size=SIZE, patch_size=PATCH, teacher_dim=WIDTH)
NETWORK = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": PATCH,
        "layers": 2,
        "width": 64,
        "head_width": 16,
    },
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Clip:
    name: str
    weights: str
    model: Any


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """The model's name, its weights as a file, and open_clip's own copy."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": NETWORK}))
    name = f"local-dir:{folder}"
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    return Clip(name, str(folder / "weights.pt"), model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 5)):
        (folder / split / "a").mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / "a" / f"{number}.png")
    return folder


@torch.no_grad()
def reference(model: Any, images: Tensor) -> Tensor:
    """Tokens of uint8 images by open_clip's other path, normalized as its own transform does."""
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels = (images.float() / 255 - mean) / std
    out = model.visual.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
    )
    normed = out["image_intermediates_prefix"] + out["image_intermediates"]
    tokens = torch.cat(normed, dim=1) @ model.visual.proj
    torch.testing.assert_close(tokens[:, 0], model.encode_image(pixels))
    return tokens


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_tokens_equal_open_clip(clip: Clip, kind: str, tmp_path: Path) -> None:
    file = clip.weights
    if kind == "safetensors":
        file = str(tmp_path / "weights.safetensors")
        save_file(clip.model.state_dict(), file)
    teacher = load_teacher(clip.name, file, FITS)
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    tokens = teacher(normalize(images))
    assert tokens.shape == (3, FITS.num_patches + 1, WIDTH)
    torch.testing.assert_close(tokens, reference(clip.model, images), rtol=1e-4, atol=1e-5)
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def words(clip: Clip, data: Path, run: Path) -> list[str]:
    text = (
        f"--preset deepmim_clip_vit_b_12 --img-size {SIZE} --patch-size {PATCH} --embed-dim 32 "
        f"--num-heads 2 --depth 4 --taps 2,4 --decoder-depth 1 --decoder-embed-dim 32 "
        f"--decoder-num-heads 2 --loss cosine --teacher-dim {WIDTH} --global-batch 16 "
        f"--microbatch-size 8 --steps 8 --warmup-epochs 0 --blr 0.05 --print-every 1 "
        f"--teacher {clip.name} --teacher-weights {clip.weights} --data {data} --output {run}"
    )
    return text.split()


def test_training_lowers_the_loss(clip: Clip, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "launcher/pretrain.py", *words(clip, data, run)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(run)
    for name in ("block02", "block04"):
        first, last = (rows[index]["losses"][name] for index in (0, -1))
        assert 1.5 < first < 2.5, "features of an untrained model are nearly orthogonal"
        assert last < 0.8 * first, f"{name}: {[row['losses'][name] for row in rows]}"
    # The validation losses of the last step, again: from the checkpoint and open_clip's own tokens.
    batches = validation(load_run_config(run), str(data))
    model, sums = load_model(run), torch.zeros(2)
    for batch in batches:
        features = reference(clip.model, batch.images)
        with torch.no_grad():
            out = model(normalize(batch.images), noise=batch.noise, teacher=features)
        sums += torch.stack(list(out.losses.values())) * len(batch.images)
    expected = (sums / sum(len(batch.images) for batch in batches)).tolist()
    assert list(rows[-1]["validation_losses"].values()) == pytest.approx(expected, rel=1e-4)


BAD = {
    "name": ("--teacher ViT-B-16-quickgel", "did you mean ViT-B-16-quickgelu?"),
    "folder": ("--teacher local-dir:nowhere", "teacher=local-dir:nowhere: cannot be built"),
    "kind": ("--teacher RN50 --teacher-weights openai", "must be a vision transformer"),
    "weights": ("--teacher-weights nowhere.pt", "must be a file or a tag"),
    "damaged": (f"--teacher-weights {__file__}", "give a local file with the state dict of"),
    "grid": ("--patch-size 16", "17 tokens from image size 32 and patch size 8, the model has 5"),
    "width": ("--teacher-dim 512", "teacher_dim=512: the features of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, clip: Clip, data: Path, tmp_path: Path, error_of: Callable[[list[str]], str]
) -> None:
    flags, expected = BAD[name]
    command = [*words(clip, data, tmp_path / "run"), *flags.split()]
    assert expected in error_of(command)


def test_not_installed(
    clip: Clip,
    data: Path,
    tmp_path: Path,
    error_of: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in error_of(words(clip, data, tmp_path / "run"))


def test_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = ModelConfig(target="clip")
    with pytest.raises(UserError, match=r"locate the file on the Hub.*; give a local file"):
        load_teacher("ViT-B-16-quickgelu", "metaclip_fullcc", config)
    with pytest.raises(UserError, match="need QuickGELU; use --teacher ViT-B-16-quickgelu"):
        load_teacher("ViT-B-16", "openai", config)
