"""Targets hog, timm and ema against references that share no code with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from skimage.feature import hog as skimage_hog
from torch import Tensor

from deepmim_scale.batch import Batch, masking_from_noise
from deepmim_scale.checkpoint import networks
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from deepmim_scale.models import build_model
from deepmim_scale.models.model import Model, local_backward
from deepmim_scale.objectives import build_objective, find_objective, objective_of
from deepmim_scale.objectives.ema import Ema
from deepmim_scale.objectives.features import FrozenTeacher
from deepmim_scale.objectives.hog import BINS, cell_side, hog, hog_width
from deepmim_scale.pipeline.compatibility import check_combination
from deepmim_scale.plan.resolve import training_plan
from deepmim_scale.train.pretrain import main

TINY: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 16,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "taps": (1, 2),
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "mask_ratio": 0.6,
}
NAME, WIDTH = "vit_tiny_patch16_224", 192


def model_config(target: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | {"target": target} | changes))


def images_and_noise(config: ModelConfig, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    side = config.img_size
    images = torch.randn(count, config.in_chans, side, side, generator=generator)
    return images, torch.rand(count, config.num_patches, generator=generator)


def hog_by_loops(image: np.ndarray, patch: int, cell: int) -> np.ndarray:
    """Image [C, S, S] -> [L, C * 9 * c * c] in float64, one pixel after the other."""
    channels, side, _ = image.shape
    cells, grid = patch // cell, side // patch
    histograms = np.zeros((channels, side // cell, side // cell, BINS))
    for channel in range(channels):
        for row in range(side):
            for column in range(side):
                below, above = min(row + 1, side - 1), max(row - 1, 0)
                right, left = min(column + 1, side - 1), max(column - 1, 0)
                dy = float(image[channel, below, column]) - float(image[channel, above, column])
                dx = float(image[channel, row, right]) - float(image[channel, row, left])
                degrees = math.degrees(math.atan2(dy, dx)) % 180.0
                bin_ = min(int(degrees // (180 / BINS)), BINS - 1)
                histograms[channel, row // cell, column // cell, bin_] += math.hypot(dx, dy)
    found = []
    for patch_row in range(grid):
        for patch_column in range(grid):
            values = []
            for channel in range(channels):
                for bin_ in range(BINS):
                    for i in range(cells):
                        for j in range(cells):
                            place = channel, patch_row * cells + i, patch_column * cells + j
                            length = math.sqrt(sum(histograms[place] ** 2))
                            values.append(histograms[place][bin_] / (length or 1.0))
            found.append(values)
    return np.array(found)


@pytest.mark.parametrize(("side", "patch", "cell"), [(15, 5, 5), (18, 6, 3), (24, 8, 8)])
def test_hog_equals_plain_loops(side: int, patch: int, cell: int) -> None:
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = hog(images, patch, cell)
    for image, features in zip(images, found, strict=True):
        expected = torch.from_numpy(hog_by_loops(image.numpy(), patch, cell)).float()
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_hog_equals_scikit_image_within_an_image() -> None:
    """Only inside: scikit-image has no gradient at the border."""
    side, cell = 24, 8
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(1))
    theirs = skimage_hog(
        image[0, 0].double().numpy(),
        orientations=BINS,
        pixels_per_cell=(cell, cell),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
    )
    ours = hog(image, cell, cell)[0].view(3, 3, BINS)
    # scikit-image adds 1e-5 to the norm.
    torch.testing.assert_close(
        ours[1, 1], torch.from_numpy(theirs[1, 1, 0, 0]).float(), rtol=0, atol=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 4),
    patch=st.sampled_from([2, 4, 5, 8, 16, 24]),
    grid=st.integers(1, 3),
    offset=st.integers(-8, 8),
    seed=st.integers(0, 9),
)
def test_hog_properties(channels: int, patch: int, grid: int, offset: int, seed: int) -> None:
    config = ModelConfig(
        **(TINY | {"img_size": 2 * patch, "patch_size": patch, "in_chans": channels}), target="hog"
    )
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that adding one rounds nothing.
    images = torch.randint(0, 9, (2, channels, grid * patch, grid * patch), generator=generator)
    images = images.float()
    features = hog(images, patch, cell_side(config))
    cells = (patch // min(8, patch)) ** 2
    assert config.out_dim == hog_width(config) == channels * 9 * cells
    assert features.shape == (2, grid**2, config.out_dim)
    lengths = features.view(2, grid**2, channels, BINS, cells).norm(dim=3)
    flat = lengths == 0
    torch.testing.assert_close(lengths[~flat], torch.ones_like(lengths[~flat]))
    assert torch.equal(hog(images + offset, patch, cell_side(config)), features)
    torch.testing.assert_close(hog(images * 4, patch, cell_side(config)), features)


def test_hog_turns_with_the_image() -> None:
    """A ramp to the right votes into the first bin, a ramp downwards into the middle one."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert hog(ramp, 8, 8)[0, 0].tolist() == [1.0] + [0.0] * 8
    assert hog(-ramp, 8, 8)[0, 0].tolist() == [1.0] + [0.0] * 8
    assert hog(ramp.mT, 8, 8)[0, 0].tolist() == [0.0] * 4 + [1.0] + [0.0] * 4


def test_constant_images_give_zeros_and_finite_gradients() -> None:
    config = model_config("hog")
    images = torch.full((1, 3, 48, 48), 0.5)
    assert not hog(images, 16, 8).any()
    model = build_model(config)
    out = model(images, noise=images_and_noise(config, 1)[1])
    out.loss.backward()
    assert torch.isfinite(out.loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_hog_needs_whole_cells() -> None:
    with pytest.raises(ValueError, match=r"patch_size=12: must be divisible by a HOG cell's side"):
        model_config("hog", patch_size=12)


def test_hog_of_bytes_is_that_of_normalized_images() -> None:
    config = model_config("hog")
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    noise = images_and_noise(config)[1]
    masking = masking_from_noise(noise, config.num_visible)
    found = build_objective(config).prepare(Batch(images, noise), masking)
    features = hog(normalize(images), 16, 8)
    expected = torch.stack([f[ids] for f, ids in zip(features, masking.ids_masked, strict=True)])
    assert torch.equal(found, expected)


def check_gradients(config: ModelConfig, prepare: Callable[[Model], None], **given: Any) -> None:
    """The joint and the local way: the same losses and gradients, bit for bit."""
    images, noise = images_and_noise(config)
    gradients, losses = [], []
    for local in (False, True):
        model = build_model(config, seed=5)
        prepare(model)
        if local:
            losses.append(local_backward(model, images, noise=noise, **given).losses)
        else:
            out = model(images, noise=noise, **given)
            out.loss.backward()
            losses.append(out.losses)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys() == {"block01", "block02"}
    assert all(torch.equal(losses[0][name].detach(), losses[1][name]) for name in losses[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(gradient.any() for n, gradient in gradients[0].items() if "pred" in n)


def test_local_gradients_of_hog() -> None:
    check_gradients(model_config("hog"), lambda model: None)


def test_local_gradients_of_timm() -> None:
    config = model_config(f"timm:{NAME}", teacher_dim=WIDTH)
    teacher = torch.randn(2, config.num_patches + 1, WIDTH)
    check_gradients(config, lambda model: None, teacher=teacher)


def test_local_gradients_of_ema() -> None:
    config = model_config("ema")

    def give_teacher(model: Model) -> None:
        model.objective = build_objective(config, Ema(build_model(config, seed=8), 0.5))

    check_gradients(config, give_teacher)


def test_a_missing_teacher_is_named() -> None:
    for target in (f"timm:{NAME}", "ema"):
        config = model_config(target)
        images, noise = images_and_noise(config)
        with pytest.raises(ValueError, match=f"target={target}: needs .* from its teacher"):
            build_model(config)(images, noise=noise)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A timm model with a head, as its authors publish it: a file, and timm's own copy."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=48, num_classes=7).eval()
    file = tmp_path_factory.mktemp("timm") / "vit.pt"
    torch.save(model.state_dict(), file)
    return str(file), model


def timm_run(file: str, name: str = NAME, **changes: Any) -> RunConfig:
    values = {"teacher_dim": WIDTH, "teacher": file} | changes
    return RunConfig(model=model_config(f"timm:{name}", **values))


def load_timm(run: RunConfig) -> Any:
    return objective_of(run.model).load_teacher(run, networks)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_timm_tokens_equal_timm(vit: tuple[str, Any], kind: str, tmp_path: Path) -> None:
    file, model = vit
    if kind == "safetensors":
        file = str(tmp_path / "vit.safetensors")
        save_file(model.state_dict(), file)
    run = timm_run(file)
    teacher = load_timm(run)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    # This architecture's own statistics are 0.5 in every channel, not ImageNet's.
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) != IMAGENET_MEAN
    with torch.no_grad():
        expected = model.forward_features((images.float() / 255 - 0.5) / 0.5)
    found = teacher(normalize(images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (2, run.model.num_patches + 1, WIDTH)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training

    noise = images_and_noise(run.model)[1]
    masking = masking_from_noise(noise, run.model.num_visible)
    objective = build_objective(run.model, teacher)
    targets = objective.prepare(Batch(images, noise), masking)
    masked = torch.stack([f[1:][i] for f, i in zip(expected, masking.ids_masked, strict=True)])
    prediction = torch.randn(masked.shape)
    cosine = torch.nn.functional.cosine_similarity(prediction.double(), masked.double(), dim=-1)
    loss = objective.loss("block01", [prediction], targets, 1.0)
    assert float(loss) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-4)


def test_timm_size_for_the_planner() -> None:
    size = objective_of(model_config(f"timm:{NAME}")).teacher_size(model_config(f"timm:{NAME}"))
    assert size is not None
    assert (size.depth, size.width, size.num_tokens) == (12, WIDTH, 10)
    two = model_config("timm:deit_tiny_distilled_patch16_224")
    distilled = objective_of(two).teacher_size(two)
    assert distilled is not None
    assert distilled.num_tokens == 11


def test_timm_mistakes_are_one_line(vit: tuple[str, Any], tmp_path: Path) -> None:
    file, model = vit
    wrong = tmp_path / "wrong.pt"
    torch.save({"weight": torch.zeros(2)}, wrong)
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    larger = tmp_path / "larger.pt"
    state = model.state_dict()
    torch.save(state | {"pos_embed": torch.zeros(1, 197, WIDTH)}, larger)
    cases = {
        f"teacher={wrong}: no weights of timm:{NAME}": timm_run(str(wrong)),
        f"teacher={text}: no weights of timm:{NAME}": timm_run(str(text)),
        f"teacher={larger}: no weights of timm:{NAME} for img_size=48": timm_run(str(larger)),
        "teacher_dim=64: the features of timm:vit_tiny_patch16_224 are 192 wide; "
        "use --teacher-dim 192": timm_run(file, teacher_dim=64),
        f"target=timm:{NAME}: must be a timm vision transformer for img_size=48, patch_size=8 (its "
        "patch size is (16, 16)); see": timm_run(file, patch_size=8),
        "target=timm:vit_none: must be a timm vision transformer": timm_run(file, "vit_none"),
        f"target=timm:{NAME}.none: must be a timm vision transformer": timm_run(
            file, f"{NAME}.none"
        ),
        "target=timm:resnet18: must be a timm vision transformer": timm_run(file, "resnet18"),
        "target=timm:swin_tiny_patch4_window7_224: must be a timm vision transformer": timm_run(
            file, "swin_tiny_patch4_window7_224"
        ),
    }
    for expected, run in cases.items():
        with pytest.raises(UserError) as caught:
            load_timm(run)
        assert str(caught.value).startswith(expected), caught.value
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="size mismatch for pos_embed"):
        load_timm(timm_run(str(larger)))


WORDS = "--preset debug --target timm:vit_tiny_patch16_224 --teacher-dim 192 --data nowhere"


@pytest.mark.parametrize("words", ["", "--teacher nowhere.pt"])
def test_timm_needs_a_file(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*WORDS.split(), *words.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    file = words.removeprefix("--teacher ")
    assert error.startswith(f"error: teacher={file}: target timm:{NAME} needs that model's weights")


def test_unknown_targets() -> None:
    for target in ("timm", "timm:", "hog:9", "pixels"):
        with pytest.raises(ValueError, match=r"unknown; choose one of pixel, clip, hybrid, hog"):
            find_objective(target)


def test_ema_moves_towards_the_model() -> None:
    config = model_config("ema")
    decay = 0.9
    teacher = Ema(build_model(config, seed=1), decay)
    objective = build_objective(config, teacher)
    student = build_model(config, seed=2)
    expected = {name: weight.double() for name, weight in objective.state().items()}
    assert {"cls_token", "patch_embed.proj.weight", "norm.weight"} <= expected.keys()
    assert not any(name.startswith(("decoders.", "pos_embed")) for name in expected)
    trained = dict(student.named_parameters())
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(trained[name], objective.state()[name])
    for _ in range(3):
        objective.after_step(trained)
        for name, weight in expected.items():
            expected[name] = decay * weight + (1 - decay) * trained[name].detach().double()
    for name, weight in objective.state().items():
        torch.testing.assert_close(weight, expected[name].float(), rtol=1e-6, atol=1e-7)
        assert not weight.requires_grad


def test_ema_state_round_trip() -> None:
    config = model_config("ema")
    teachers = [Ema(build_model(config, seed=seed), 0.9) for seed in (1, 2)]
    first, second = (build_objective(config, teacher) for teacher in teachers)
    images, noise = images_and_noise(config)
    masking = masking_from_noise(noise, config.num_visible)
    before = first.prepare(Batch(images, noise), masking)
    assert not torch.equal(second.prepare(Batch(images, noise), masking), before)
    second.load_state({name: weight.clone() for name, weight in first.state().items()})
    assert torch.equal(second.prepare(Batch(images, noise), masking), before)


def test_ema_targets_are_normalized_latents_of_the_masked_patches() -> None:
    config = model_config("ema")
    network = build_model(config, seed=1)
    images, noise = images_and_noise(config)
    masking = masking_from_noise(noise, config.num_visible)
    found = build_objective(config, Ema(network, 0.9)).prepare(Batch(images, noise), masking)
    assert found.shape == (2, config.num_patches - config.num_visible, config.embed_dim)
    torch.testing.assert_close(found.mean(-1), torch.zeros(found.shape[:2]), rtol=0, atol=1e-5)
    variance = found.var(-1, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-3)
    *_, tokens = network.features(images)
    latents = torch.stack([t[1:][i] for t, i in zip(tokens, masking.ids_masked, strict=True)])
    latents = latents.double()
    centered = latents - latents.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["hog", "ema"])
def test_training_lowers_the_loss(target: str) -> None:
    config = model_config(target)
    model = build_model(config, seed=1)
    if target == "ema":
        model.objective = build_objective(config, Ema(build_model(config, seed=1), 0.99))
    images, noise = images_and_noise(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        out = local_backward(model, images, noise=noise)
        optimizer.step()
        optimizer.zero_grad()
        model.objective.after_step(dict(model.named_parameters()))
        losses.append(float(out.loss))
    assert min(losses[-5:]) < 0.8 * losses[0], losses


def test_ema_needs_one_stage() -> None:
    config = model_config("ema")
    expected = "stages=2: target ema follows the whole encoder and needs one stage; use --stages 1"
    with pytest.raises(UserError) as caught:
        check_combination(config, 2, "dib")
    assert str(caught.value) == expected
    with pytest.raises(UserError, match="stages=2: target ema follows the whole encoder"):
        training_plan(RunConfig(model=config, stages=2), 4)
    assert training_plan(RunConfig(model=config), 4).text == "1d1d"


@pytest.mark.parametrize("target", ["hog", "ema", f"timm:{NAME}"])
def test_pairs_predict_pixels_only(target: str) -> None:
    with pytest.raises(ValueError, match="mirl is defined for target pixel"):
        ModelConfig(method="mirl", depth=6, target=target)


def test_imagenet_statistics_are_those_of_the_trained_model() -> None:
    """A teacher with ImageNet's own statistics gets the images as they are."""
    teacher = FrozenTeacher(torch.nn.Identity(), lambda images: images, IMAGENET_MEAN, IMAGENET_STD)
    images = torch.randn(1, 3, 4, 4)
    assert torch.equal(teacher(images), images)
