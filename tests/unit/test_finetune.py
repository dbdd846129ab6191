"""Fine-tuning: recipes, images, mixing, counts and files."""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from color_classes import write_color_classes
from PIL import Image
from safetensors.torch import save_file
from timm.data import auto_augment

from deepmim_scale.checkpoint.sizes import EncoderSizes, header_of
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.step_loader import Share, Span
from deepmim_scale.errors import UserError
from deepmim_scale.finetune.command import parse_finetune
from deepmim_scale.finetune.data import TrainingImages, iter_evaluation, iter_steps, open_labelled
from deepmim_scale.finetune.draws import seed_sample
from deepmim_scale.finetune.evaluation import Counter
from deepmim_scale.finetune.files import summarize
from deepmim_scale.finetune.mixing import Mixing
from deepmim_scale.finetune.model import begin_head
from deepmim_scale.finetune.prepare import prepare
from deepmim_scale.finetune.presets import FINETUNE_PRESETS, load_finetune_preset
from deepmim_scale.finetune.transform import crop_share, evaluation_transform, train_transform
from deepmim_scale.models.classifier import build_classifier
from deepmim_scale.presets import load_preset

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


def test_presets_are_the_published_recipes() -> None:
    rows = {
        # epochs, warm-up, peak rate, batch, layer decay, drop path, average
        "finetune_mae_b": (100, 5, 2e-3, 1024, 0.65, 0.1, 0),
        "finetune_mae_l": (50, 5, 4e-3, 1024, 0.75, 0.2, 0),
        "finetune_mae_h": (50, 5, 4e-3, 1024, 0.75, 0.3, 0),
        "finetune_deepmim_b": (100, 5, 2e-3, 1024, 0.65, 0.1, 0),
        "finetune_deepmim_clip_b": (100, 5, 4e-4, 1024, 0.6, 0.1, 0),
        "finetune_mirl_b_48": (60, 30, 6e-3, 2048, 0.88, 0, 0.9998),
        "finetune_mirl_s_54": (100, 20, 6e-3, 2048, 0.88, 0.1, 0.9998),
    }
    assert rows.keys() == FINETUNE_PRESETS.keys()
    for name, (epochs, warmup, peak, batch, layer_decay, drop_path, average) in rows.items():
        config = load_finetune_preset(name)
        assert (config.epochs, config.warmup_epochs) == (epochs, warmup)
        assert config.global_batch == batch
        assert config.blr * batch / 256 == pytest.approx(peak)
        assert (config.layer_decay, config.drop_path) == (layer_decay, drop_path)
        assert config.ema_decay == average
        assert (config.mixup, config.cutmix, config.smoothing, config.erase) == (0.8, 1, 0.1, 0.25)
        assert (config.weight_decay, config.beta2, config.clip_grad) == (0.05, 0.999, 0)


@pytest.mark.parametrize(
    ("preset", "source"),
    [
        ("finetune_mae_b", "mae_vit_b_12"),
        ("finetune_mae_l", "mae_vit_l_24"),
        ("finetune_deepmim_b", "deepmim_vit_b_12"),
        ("finetune_mirl_b_48", "mirl_vit_b_48"),
        ("finetune_mirl_s_54", "mirl_vit_s_54"),
    ],
)
def test_presets_fit_those_of_pretraining(preset: str, source: str) -> None:
    config, model = load_finetune_preset(preset), load_preset(source).model
    for name in EncoderSizes.__annotations__:
        if name != "in_chans":
            assert getattr(config, name) == getattr(model, name), name


def test_2000_draws_of_the_training_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them ask Pillow to keep 0 bits, which it refuses; the official result is black."""
    kept: list[int] = []
    posterize = auto_augment.posterize

    def spied(image: Image.Image, bits: int, **options: Any) -> Image.Image:
        kept.append(bits)
        return posterize(image, bits, **options)

    monkeypatch.setitem(auto_augment.NAME_TO_OP, "PosterizeIncreasing", spied)
    transform = train_transform(
        32, auto_augment="rand-m9-mstd0.5-inc1", min_crop=0.08, flip=0.5, erase=0.25
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8))
    for sample in range(2000):
        seed_sample(0, 0, sample)
        pixels = transform(picture)
        assert pixels.shape == (3, 32, 32)
        assert pixels.isfinite().all()
    assert len(kept) > 50
    assert min(kept) > 0, "0 bits never reach Pillow"


def test_posterizing_to_nothing_is_black() -> None:
    transform = train_transform(
        16, auto_augment="rand-m10-n1-inc1", min_crop=1.0, flip=0.0, erase=0.0
    )
    augment = next(part for part in transform.transforms if hasattr(part, "ops"))  # type: ignore[attr-defined]
    operation = next(op for op in augment.ops if op.name == "PosterizeIncreasing")
    operation.prob = 1.0
    white = Image.new("RGB", (4, 4), "white")
    assert operation(white).getextrema() == ((0, 0),) * 3


def test_evaluation_leaves_no_margin_above_224() -> None:
    assert [crop_share(size) for size in (32, 224, 225, 448)] == [0.875, 0.875, 1.0, 1.0]
    assert crop_share(448, 0.9) == 0.9


def step_images(
    colors: Path, share: Share, span: Span, workers: int = 0, **changes: Any
) -> list[torch.Tensor]:
    sources = open_labelled(str(colors), "", "fail")
    plan = SamplePlan(len(sources.train), seed=3, global_batch=4)
    transform = train_transform(
        16, auto_augment="rand-m9-mstd0.5-inc1", min_crop=0.5, flip=0.5, erase=0.5
    )
    images = TrainingImages(sources.train, sources.train_labels, plan, transform, "fail")
    steps = iter_steps(images, plan, share, span, workers)
    return [torch.cat([batch.pixels for batch in step]) for step in steps]


def test_images_depend_on_their_place_alone(colors: Path) -> None:
    """Not on workers, micro-batches, replicas, or the step where a run goes on."""
    whole = step_images(colors, Share(num_microbatches=2), Span(0, 5))
    torch.manual_seed(99)
    random.seed(99)
    again = step_images(colors, Share(num_microbatches=1), Span(0, 5), workers=2)
    late = step_images(colors, Share(num_microbatches=2), Span(3, 2))
    parts = [step_images(colors, Share(rank, 2, 1), Span(0, 5)) for rank in (0, 1)]
    for step in range(5):
        assert torch.equal(whole[step], again[step])
        assert torch.equal(whole[step], torch.cat([part[step] for part in parts]))
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], late, strict=True))
    epochs = [torch.cat(whole[:3]), torch.cat(whole[2:])]
    assert not torch.equal(*(epoch.sort(0).values[:4] for epoch in epochs))


def test_a_bad_image_is_replaced_by_the_next(
    colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(colors, data)
    spoiled = data / "train/b/2.png"
    spoiled.write_bytes(spoiled.read_bytes()[:90])  # the header is whole
    sources = open_labelled(str(data), "", "replace")
    plan = SamplePlan(12, seed=0, global_batch=12)
    transform = train_transform(16, auto_augment="", min_crop=1.0, flip=0.0, erase=0.0)
    images = TrainingImages(sources.train, sources.train_labels, plan, transform, "replace")
    (step,) = iter_steps(images, plan, Share(), Span(0, 1), 0)
    order = plan.sample_ids(0).tolist()
    names = [sources.train.name(i) for i in order]
    place = names.index(str(spoiled))
    following = order[(place + 1) % 12]
    assert step[0].labels[place] == sources.train_labels[following]
    assert "the next sample replaces it" in capsys.readouterr().err


def test_mixing_depends_on_its_place_alone() -> None:
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    mixing = Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1, num_classes=5, seed=1)
    first, targets = mixing(images.clone(), labels, 7, 2)
    np.random.seed(0)  # noqa: NPY002
    second, _ = mixing(images.clone(), labels, 7, 2)
    other, _ = mixing(images.clone(), labels, 7, 3)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert targets.sum(1).tolist() == pytest.approx([1] * 4)


def test_without_mixing_images_stay() -> None:
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 1])
    mixing = Mixing(mixup=0, cutmix=0, smoothing=0.1, num_classes=2, seed=1)
    same, targets = mixing(images, labels, 0, 0)
    assert same is images
    assert targets is labels


def test_counts_of_ties_and_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    counter = Counter([""], 2, torch.device("cpu"))
    logits = torch.tensor([[1.0, 1, 1], [1, 1, 1], [0, 2, 1], [float("nan")] * 3])
    counter.add("", logits, torch.tensor([0, 1, 2, 0]))
    counter.reduce(4)
    right, likeliest, _, images = counter.counts[""]
    assert (right, likeliest, images) == (1, 3, 4), "of equals the first wins; NaN is wrong"
    with pytest.raises(AssertionError, match="4 images counted of 5"):
        counter.reduce(5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_validation_image_is_seen_once(colors: Path, ranks: int) -> None:
    """By unequal shares, and without repeating any to make them equal."""
    sources = open_labelled(str(colors), "", "fail")
    seen: list[float] = []
    for rank in range(ranks):
        shares = iter_evaluation(
            sources.val,
            np.arange(9),
            evaluation_transform(16),
            rank=rank,
            num_ranks=ranks,
            batch=2,
            workers=0,
        )
        seen += [label for images in shares for label in images.labels.tolist()]
    assert sorted(seen) == list(range(9))


def test_best_and_last() -> None:
    rows = [
        {"step": 1, "epoch": 0.5, "accuracy": 40.0, "ema_accuracy": 10.0},
        {"step": 2, "epoch": 1.0},
        {"step": 3, "epoch": 1.5, "accuracy": 30.0, "ema_accuracy": 35.0},
        {"step": 4, "epoch": 2.0, "accuracy": 50.0, "ema_accuracy": 35.0},
    ]
    summary = summarize(rows)
    assert summary["best"] == {"step": 3, "epoch": 1.5, "accuracy": 35.0}
    assert summary["last"]["step"] == 4
    assert summarize([*rows[1:2], rows[0] | {"accuracy": 7.0}])["best"]["step"] == 1


def test_a_new_head_says_nothing() -> None:
    model = build_classifier(SIZES, 50, "mean", seed=1)
    begin_head(model, seed=1)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)  # type: ignore[union-attr, operator]
    assert not model.head.bias.any()  # type: ignore[union-attr, operator]


def test_larger_input_resizes_positions(colors: Path, tmp_path: Path) -> None:
    file = tmp_path / "encoder.safetensors"
    model = build_classifier(SIZES, 0, "class", seed=5)
    save_file(model.state_dict(), file, header_of(SIZES))
    words = [
        str(file),
        "--data",
        str(colors),
        "--img-size",
        "32",
        *SMALL,
        "--output",
        str(tmp_path / "o"),
    ]
    prepared = prepare(parse_finetune(words, prog="finetune"))
    assert prepared.model.pos_embed.shape == (1, 17, 16)
    assert torch.equal(prepared.model.pos_embed[:, 0], model.pos_embed[:, 0])  # type: ignore[index]
    assert torch.equal(prepared.model.fc_norm.weight, torch.ones(16))
    assert "position table resized to 32 px" in prepared.notes[0]


def fine_tuned_file(path: Path, classes: int = 3, pool: Any = "mean") -> Path:
    model = build_classifier(SIZES, classes, pool, seed=2)
    save_file(model.state_dict(), path, header_of(SIZES, tuple("abcdefg"[:classes])))
    return path


def test_checkpoints_of_official_code_are_read(colors: Path, tmp_path: Path) -> None:
    """They are pickles that hold a command line beside `model`."""
    file = tmp_path / "checkpoint-99.pth"
    model = build_classifier(SIZES, 3, "mean", seed=4)
    content = {"model": model.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": 99}
    torch.save(content, file)
    words = [str(file), "--num-heads", "2", "--data", str(colors), *SMALL, "--eval"]
    prepared = prepare(parse_finetune(words, prog="finetune"))
    for name, value in prepared.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_evaluation_reads_what_the_head_read(colors: Path, tmp_path: Path) -> None:
    file = fine_tuned_file(tmp_path / "class.safetensors", pool="class")
    words = [str(file), "--data", str(colors), "--eval"]
    prepared = prepare(parse_finetune(words, prog="finetune"))
    assert prepared.config.pool == "class"
    assert prepared.model.state_dict().keys() >= {"norm.weight", "head.weight"}


def test_files_load_strictly_in_timm(tmp_path: Path) -> None:
    """Also with the official names, which are timm's."""
    file = fine_tuned_file(tmp_path / "best.safetensors")
    loaded = timm.create_model(
        "vit_base_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=3,
        global_pool="avg",
        checkpoint_path=str(file),
    )
    expected = build_classifier(SIZES, 3, "mean", seed=2).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(images), expected(images))


def test_weights_without_a_word_of_heads(tmp_path: Path, colors: Path) -> None:
    file = tmp_path / "bare.safetensors"
    save_file(build_classifier(SIZES, 0, "class").state_dict(), file)
    words = [str(file), "--data", str(colors), *SMALL, "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"num_heads: .* does not tell it"):
        prepare(parse_finetune(words, prog="finetune"))
