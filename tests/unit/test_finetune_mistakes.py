"""Mistakes in fine-tuning are told in one line, with exit code 2, before processes start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from color_classes import write_color_classes
from safetensors.torch import save_file

from deepmim_scale.checkpoint.sizes import EncoderSizes, header_of
from deepmim_scale.ds_config import BatchSizes, load_ds_config, resolve_ds_config
from deepmim_scale.finetune.command import main
from deepmim_scale.finetune.settings import FinetuneConfig
from deepmim_scale.models.classifier import build_classifier

SIZES = EncoderSizes(16, 8, 16, 3, 2, 4.0)
MODEL = [
    "--patch-size",
    "8",
    "--embed-dim",
    "16",
    "--depth",
    "3",
    "--num-heads",
    "2",
    "--img-size",
    "16",
]
SMALL = ["--microbatch-size", "4", "--global-batch", "8"]


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 4 training images and 3 for validation each."""
    root = tmp_path_factory.mktemp("colors")
    return write_color_classes(root, train=4, val=3, size=(24, 30))


def fine_tuned_file(path: Path, classes: int = 3, pool: Any = "mean") -> Path:
    model = build_classifier(SIZES, classes, pool, seed=2)
    save_file(model.state_dict(), path, header_of(SIZES, tuple("abcdefg"[:classes])))
    return path


def only_class(data: Path) -> None:
    for split in ("train", "val"):
        for name in "bc":
            shutil.rmtree(data / split / name)


Change = Callable[[Path], object]
BAD: list[tuple[str, list[str], Change, str]] = [
    (
        "classes differ",
        MODEL,
        lambda data: (data / "val/a").rename(data / "val/z"),
        "class z has no images in train",
    ),
    ("one class", MODEL, only_class, "has the single class a"),
    ("top-5 of 3", [*MODEL, "--top", "5"], lambda data: None, "top=5: there are 3 classes"),
    (
        "odd micro-batch",
        [*MODEL, "--microbatch-size", "3"],
        lambda data: None,
        "microbatch_size=3: mixup and cutmix pair the images",
    ),
    ("lars", [*MODEL, "--optimizer", "lars"], lambda data: None, "optimizer=lars: needs whole"),
    ("no sizes", [], lambda data: None, "img_size: missing; give weights to start from"),
    ("depth", ["FILE", "--depth", "4"], lambda data: None, "depth=4: the weights of"),
    (
        "another preset",
        ["FILE", "--preset", "finetune_mae_b"],
        lambda data: None,
        "patch_size=16: the weights of",
    ),
    ("no file", ["nowhere", *MODEL], lambda data: None, "nowhere: does not exist"),
    ("policy", [*MODEL, "--auto-augment", "augmix"], lambda data: None, "must be a RandAugment"),
    ("policy's words", [*MODEL, "--auto-augment", "rand-q9"], lambda data: None, "auto_augment="),
    ("eval of scratch", [*MODEL, "--eval"], lambda data: None, "eval=True: evaluates a fine"),
    ("MAE's flag", [*MODEL, "--nb_classes", "3"], lambda data: None, "--nb_classes: unknown"),
    ("head", ["HEAD7"], lambda data: None, "its head has 7 classes, the data 3"),
    ("head in eval", ["HEAD7", "--eval"], lambda data: None, "its head has 7 classes"),
    ("pool", ["HEAD3", "--pool", "class"], lambda data: None, "norm.bias: missing"),
]


@pytest.mark.parametrize(("words", "change", "message"), [row[1:] for row in BAD])
def test_mistakes(
    words: list[str],
    change: Change,
    message: str,
    colors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(colors, data)
    change(data)
    files = {
        "FILE": fine_tuned_file(tmp_path / "file.safetensors"),
        "HEAD3": fine_tuned_file(tmp_path / "three.safetensors"),
        "HEAD7": fine_tuned_file(tmp_path / "seven.safetensors", 7),
    }
    words = [str(files.get(word, word)) for word in words]
    small = [] if "--global-batch" in words or "--microbatch-size" in words else SMALL
    with pytest.raises(SystemExit) as stop:
        main([*words, *small, "--data", str(data), "--output", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert not dist.is_initialized()


def test_clipping_is_always_filled_in() -> None:
    """DeepSpeed clips at 1 where its JSON has no such key."""
    content = load_ds_config("cpu_fp32.json")
    content.pop("gradient_clipping", None)
    for limit in (0.0, 3.0):
        settings = FinetuneConfig(clip_grad=limit)
        resolved, _ = resolve_ds_config(content, settings, BatchSizes(32, 1, 1))
        assert resolved["gradient_clipping"] == limit
