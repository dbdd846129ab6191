"""Attention distances, head cosines and CKA against closed forms and definitions."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepmim_scale.analysis import attention, cka, losses, reconstruct
from deepmim_scale.analysis.images import evenly_spaced, open_validation
from deepmim_scale.cli import main
from deepmim_scale.evaluate.features import load_model
from deepmim_scale.images import normalize
from deepmim_scale.models import build_model
from deepmim_scale.presets import debug, load_preset
from deepmim_scale.runs.folder import write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine validation images of two classes."""
    root, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for name, count in (("a", 6), ("b", 3)):
        (root / "val" / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (70, 64, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "val" / name / f"{number}.png")
    (root / "train" / "a").mkdir(parents=True)
    return root


def uniform_distance(grid: int) -> float:
    """Mean distance of two places of a grid: offsets, counted by how often they fit."""
    offsets = itertools.product(range(1 - grid, grid), repeat=2)
    counted = sum((grid - abs(x)) * (grid - abs(y)) * (x**2 + y**2) ** 0.5 for x, y in offsets)
    return counted / grid**4


def test_maps_are_the_models_own(finished_run: Callable[[str], Path]) -> None:
    """DecodeRequest sum to 1, and values mixed by the maps are what the attention module gives."""
    model = load_model(finished_run("debug"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        hidden = model.embed_whole(images)
        for maps, block in zip(
            attention.attention_maps(model, images), model.blocks.values(), strict=True
        ):
            assert maps.shape == (2, 4, 65, 65)
            torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 65))
            normed = block.norm1(hidden)
            v = block.attn.qkv(normed)[..., 128:].unflatten(-1, (4, 16)).transpose(1, 2)
            got = block.attn.proj((maps @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(got, block.attn(normed), rtol=1e-4, atol=1e-5)
            patches = attention.between_patches(maps)
            torch.testing.assert_close(patches.sum(-1), torch.ones(2, 4, 64))
            hidden = block(hidden)


def test_uniform_attention() -> None:
    """Queries and keys of zero look everywhere alike, all heads the same."""
    model = build_model(debug)
    for block in model.blocks.values():
        block.attn.qkv.weight.data[:128] = 0
    blocks = attention.measure(model, [torch.randn(n, 3, 64, 64) for n in (2, 1)])
    assert [block.block for block in blocks] == list(range(1, 13))
    for block in blocks:
        assert block.distances == pytest.approx([uniform_distance(8)] * 4, rel=1e-5)
        assert block.head_cosine == pytest.approx(1, rel=1e-5)
    assert attention.patch_distances(8, 8).mean().item() == pytest.approx(uniform_distance(8))


def test_attention_to_one_place() -> None:
    """Every query of a 3 x 3 grid looks at itself (head 1) or at the first patch (head 2)."""
    own, first = torch.eye(9), torch.zeros(9, 9)
    first[:, 0] = 1
    maps = torch.stack([own, first])[None]
    expected = sum((x**2 + y**2) ** 0.5 for x in range(3) for y in range(3)) / 9
    assert attention.mean_distances(maps, (3, 3))[0].tolist() == pytest.approx([0, expected])
    # Only query 0 looks alike: a product of 1 over norms of 3 each.
    assert attention.head_cosines(maps).item() == pytest.approx(1 / 9)
    assert attention.head_cosines(maps[:, :1]).item() == 0, "one head has no pair"


def test_class_token_is_left_out() -> None:
    """Patches that look half at the class token and half at themselves look nowhere else."""
    maps = torch.eye(10) / 2
    maps[:, 0] += 0.5
    patches = attention.between_patches(maps[None, None])
    assert torch.equal(patches[0, 0], torch.eye(9))


def test_hsic_is_the_mean_over_four_images() -> None:
    """Song et al.'s definition, summed over every choice of four different images."""
    x, y = torch.randn(7, 3), torch.randn(7, 5)
    k, other = cka.gram(x), cka.gram(y)
    fours = list(itertools.permutations(range(7), 4))
    terms = [k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]) for i, j, q, r in fours]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(cka.hsic(k, other), expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(5, 30),
    width=st.integers(1, 40),
    scale=st.floats(1e-2, 1e2),
)
def test_cka_properties(seed: int, images: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, width, generator=generator, dtype=torch.float64)
    y = x[:, :1] + torch.randn(images, 6, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator).double())
    moved = scale * x @ rotation + torch.randn(width, generator=generator)
    table = cka.cka([x, moved, y], [x, moved, y])
    torch.testing.assert_close(table, table.T)
    torch.testing.assert_close(table[:2, :2], torch.ones(2, 2).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table[0, 2], table[1, 2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.diag(), torch.ones(3).double())
    assert table.abs().max() <= 1 + 1e-9


def test_unrelated_features_score_zero() -> None:
    """Wide features of few images: the plain estimator would give more than 0.9 here."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(100, 2000, generator=generator) for _ in range(2))
    assert abs(cka.cka([x], [y]).item()) < 0.05


def test_spread_takes_all_classes(data: Path) -> None:
    source = open_validation(str(data))
    names = [Path(source.name(i)).relative_to(source.location) for i in evenly_spaced(source, 3)]
    assert [str(name) for name in names] == ["a/0.png", "a/4.png", "b/2.png"]
    assert evenly_spaced(source, 100).tolist() == list(range(len(source)))


def test_attention_command(
    data: Path,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(finished_run("debug"))
    main(
        [
            "analyse",
            "attention",
            run,
            "--data",
            str(data),
            "--images",
            "4",
            "--output",
            str(tmp_path / "pictures"),
        ]
    )
    content = json.loads((tmp_path / "pictures" / "attention.json").read_text())
    assert content["images"] == 4
    assert [len(block["distances"]) for block in content["blocks"]] == [4] * 12
    assert "block 12  distance" in capsys.readouterr().out
    assert Image.open(tmp_path / "pictures" / "attention.png").width > 500


def test_cka_command(
    data: Path,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, other = str(finished_run("debug")), str(finished_run("debug_mirl"))
    words = ["--data", str(data), "--output", str(tmp_path), "--json", str(tmp_path / "x.json")]
    main(["analyse", "cka", run, *words])
    own = torch.tensor(json.loads((tmp_path / "x.json").read_text())["cka"])
    torch.testing.assert_close(own.diag(), torch.ones(12))
    main(["analyse", "cka", run, "--run2", other, *words])
    both = torch.tensor(json.loads((tmp_path / "x.json").read_text())["cka"])
    assert not torch.allclose(both, both.T)
    assert "9 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "cka.png").width > 500


def test_reconstruct_command(
    data: Path,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With norm_pix the guess knows as much as the decoders: every masked patch's mean."""
    main(
        [
            "analyse",
            "reconstruct",
            str(finished_run("debug")),
            "--data",
            str(data),
            "--output",
            str(tmp_path),
            "--json",
            str(tmp_path / "x.json"),
        ]
    )
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["images"] == 9
    assert list(content["errors"]) == ["block03", "block06", "block09", "block12", "patch mean"]
    printed = capsys.readouterr().out
    assert "norm_pix: masked patches' true mean and deviation are given" in printed
    assert "1.00 of guessing each masked patch's own mean" in printed
    assert Image.open(tmp_path / "reconstructions.png").width > 500


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_model_that_predicts_nothing_is_as_good_as_the_guess(norm_pix: bool, data: Path) -> None:
    """norm_pix: zeros are the patches' means, and fine structure is all that is left to learn."""
    preset = load_preset("debug")
    config = preset.model.replace(norm_pix=norm_pix)
    model = build_model(config)
    for decoder in model.decoders.values():
        torch.nn.init.zeros_(decoder.pred.weight)
        torch.nn.init.zeros_(decoder.pred.bias)
    batches = reconstruct.validation(preset.replace(model=config), str(data))
    errors = reconstruct.validation_errors(model, batches)
    guess, _ = reconstruct.GUESSES[norm_pix]
    images = normalize(torch.cat([batch.images for batch in batches]))
    if norm_pix:
        assert errors["block12"] == pytest.approx(errors[guess], rel=1e-5)
    else:  # the guess knows the image's color, zeros do not
        assert errors["block12"] == pytest.approx(images.square().mean().item(), rel=0.05)
        assert errors[guess] < 0.99 * errors["block12"]


def write_metrics(run: Path, rows: list[dict[str, Any]]) -> Path:
    write_config(load_preset("debug").replace(output=str(run)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def loss_rows(values: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": n, "losses": {"a": value}} for n, value in enumerate(values, start=1)]


def test_losses_command_with_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [4.0, None, 2.0, None, *[2.0] * 16, None, *[1.0] * 9]
    run = write_metrics(tmp_path, loss_rows(values))
    main(["analyze", "losses", str(run)])
    assert "a          3.0000 -> 1.0000  (0.33)" in capsys.readouterr().out
    content = json.loads((run / "losses.json").read_text())
    assert content == {"step": 30, "losses": {"a": {"first": 3.0, "last": 1.0}}}
    write_metrics(tmp_path, loss_rows([1.0, None]))
    main(["analyze", "losses", str(run)])
    content = json.loads((run / "losses.json").read_text())
    assert content == {"step": 2, "losses": {"a": {"first": 1.0, "last": None}}}


def test_smoothing_leaves_gaps() -> None:
    nan = math.nan
    values = np.array([4.0, 2.0, nan, nan, 6.0, nan, 2.0])
    expected = [3.0, 2.0, nan, 6.0, 6.0, 2.0]
    np.testing.assert_allclose(losses.smoothed(values, 2), expected, rtol=1e-12)


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.001, 1.002], [None, None]])
def test_losses_picture_of_a_short_run(
    values: list[float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps as ticks, and room above the highest loss."""
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda _: None)
    losses.draw(loss_rows(values), tmp_path / "losses.png")
    axes = pyplot.gcf().axes[0]
    assert all(tick == round(tick) for tick in axes.get_xticks())
    if values[-1]:
        assert axes.get_ylim()[1] > 1.03 * values[-1]
        assert axes.lines[0].get_marker() == "."
    monkeypatch.undo()
    pyplot.close("all")


@pytest.mark.parametrize("rows", [[], None])
def test_no_steps_yet(
    rows: list[dict[str, Any]] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path, rows or [])
    if rows is None:
        (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["analyse", "losses", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: has no steps yet; train first\n"


CASES = {
    "no images": (["attention", "RUN", "--images", "0"], "images=0: must be positive"),
    "too few": (["cka", "RUN", "--images", "3"], "3 validation images; cka needs 4"),
    "no run": (["cka", "RUN", "--run2", "nowhere"], "nowhere: is no run"),
    "output": (["attention", "RUN", "--output", "RUN/config.json"], "cannot be written"),
    "json": (["cka", "RUN", "--json", "/proc/nowhere/x"], "json=/proc/nowhere/x: cannot be"),
    "pictures": (["reconstruct", "RUN", "--output", "/proc/nowhere"], "output=/proc/nowhere/rec"),
    "no val": (["attention", "RUN", "--data", "RUN"], "has no validation part"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes(
    name: str, data: Path, finished_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = CASES[name]
    words = [word.replace("RUN", str(finished_run("debug"))) for word in words]
    words = words if "--data" in words else [*words, "--data", str(data)]
    with pytest.raises(SystemExit) as stop:
        main(["analyse", *words])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("\n")) == (2, 1)
    assert expected in message
