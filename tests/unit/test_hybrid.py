"""Hybrid targets: the mixture itself, and a run that learns from another run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deepmim_scale.analysis.reconstruct import validation
from deepmim_scale.config import ModelConfig
from deepmim_scale.evaluate.features import load_model
from deepmim_scale.images import normalize, patch_statistics, patchify
from deepmim_scale.model_config import even_alphas
from deepmim_scale.models import build_model
from deepmim_scale.models.blocks import gather_tokens
from deepmim_scale.runs.folder import load_run_config, read_metrics
from deepmim_scale.train.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "decoder_depth": 1,
    "decoder_embed_dim": 16,
    "decoder_num_heads": 2,
}


def test_even_alphas() -> None:
    assert even_alphas(4) == (0, 1 / 3, 2 / 3, 1)  # the paper's
    assert even_alphas(1) == (1.0,)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_losses_equal_the_formula(norm_pix: bool) -> None:
    alphas = (0.0, 0.3, 1.0)
    config = ModelConfig(depth=3, taps=(1, 2, 3), norm_pix=norm_pix, hybrid_alphas=alphas, **SMALL)
    mae = ModelConfig(method="mae", depth=2, norm_pix=norm_pix, **SMALL)
    model, generator = build_model(config).double(), build_model(mae, seed=1).double()
    images, noise = torch.randn(2, 3, 24, 24).double(), torch.rand(2, 9)
    x_hat = generator.reconstruct(images, noise)
    assert not x_hat.requires_grad
    out = model(images, noise=noise, teacher=x_hat, predictions=True)
    everything = generator(images, noise=noise, predictions=True).predictions["block02"]
    ids = model.masking(images, noise).ids_masked
    x = patchify(images, 8)
    if norm_pix:
        mean, std = patch_statistics(x)
        x = (x - mean) / std
    for alpha, (name, pred) in zip(alphas, out.predictions.items(), strict=True):
        target = alpha * x + (1 - alpha) * everything
        expected = gather_tokens((pred - target) ** 2, ids).mean()
        torch.testing.assert_close(out.losses[name], expected, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="target=hybrid: needs a reconstruction"):
        model(images, noise=noise)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        (folder / split / "a").mkdir(parents=True)
        for number in range(8):
            pixels = torch.randint(0, 256, (24, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / "a" / f"{number}.png")
    return folder


def words(data: Path, run: Path, *more: str) -> list[str]:
    small = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    return [
        "--data",
        str(data),
        "--output",
        str(run),
        "--depth=4",
        "--microbatch-size=4",
        "--steps=2",
        "--warmup-epochs=0",
        *small,
        *more,
    ]


def pretrain(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "launcher/pretrain.py", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def mae(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mae"
    pretrain("--preset", "debug_mae", *words(data, run, "--taps=4"))
    return run


def test_run_learns_from_a_run(mae: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain("--preset", "debug", *words(data, run, "--taps=2,3,4", "--hybrid", str(mae)))
    config = load_run_config(run)
    assert config.model.mix_alphas == (0, 0.5, 1)
    # The validation losses of the last step, again, from both checkpoints.
    batches = validation(config, str(data))
    model, generator, sums = load_model(run), load_model(mae), torch.zeros(3)
    for batch in batches:
        images = normalize(batch.images)
        with torch.no_grad():
            out = model(
                images, noise=batch.noise, teacher=generator.reconstruct(images, batch.noise)
            )
        sums += torch.stack(list(out.losses.values())) * len(images)
    found = list(read_metrics(run)[-1]["validation_losses"].values())
    assert found == pytest.approx((sums / 8).tolist(), rel=1e-5)


BAD = {
    "no run": ("--hybrid nowhere", "nowhere: is no run"),
    "mask": ("--hybrid MAE --mask-ratio 0.5", "has mask_ratio=0.75, this run mask_ratio=0.5"),
    "method": ("--hybrid MAE --taps 4 --method mae", "are for method deepmim and target pixel"),
    "count": ("--hybrid MAE --hybrid-alphas 0 1", "hybrid_alphas=0,1: must be 3 numbers"),
    "range": ("--hybrid MAE --hybrid-alphas 0 2 1", "hybrid_alphas=0,2,1: must lie in [0, 1]"),
    "no generator": (
        "--hybrid-alphas 0 0.5 1",
        "needs a run of method mae",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, mae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = BAD[name]
    more = ["--taps=2,3,4", *flags.replace("MAE", str(mae)).split()]
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "debug", *words(data, tmp_path / "run", *more)])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1, f"not one line: {err}"
    assert expected in err


def test_generator_must_be_an_mae(
    mae: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "deepmim"
    run.mkdir()
    text = (mae / "config.json").read_text().replace('"mae"', '"deepmim"')
    (run / "config.json").write_text(text)
    more = ["--taps=2,3,4", "--hybrid", str(run)]
    with pytest.raises(SystemExit):
        main(["--preset", "debug", *words(data, tmp_path / "run", *more)])
    assert (
        "a run of method deepmim and target pixel; give one of method mae"
        in capsys.readouterr().err
    )
