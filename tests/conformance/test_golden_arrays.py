"""Weights and arrays of the official implementations; golden/README.md tells how they were made.

MAE and DeepMIM were run in float64; MIRL is Paddle's float32 run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepmim_kernels import reference

from deepmim_scale.checkpoint import load_official, official_names
from deepmim_scale.models import Model, ModelConfig, build_model

GOLDEN = Path(__file__).parent / "golden"
TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "num_heads": 4,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}
MAE = ModelConfig(method="mae", embed_dim=32, depth=4, **TINY)
DEEPMIM = {"method": "deepmim", "embed_dim": 16, "depth": 12, "taps": (6, 8, 10, 12)}
MIRL = ModelConfig(method="mirl", embed_dim=20, depth=12, **TINY)
LOSSES = {
    "mae": [1.1552080996361895],
    "deepmim": [2.002691755546808, 1.9917497258346168, 1.9902129602243894, 2.0125584469978075],
    "pixel": [1.1252536114508962, 1.1685291234823498, 1.1289007470996952, 1.138249245574878],
    "mirl": [1.1633937, 1.1888007, 1.1917966],
}


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}_tiny.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def run(config: ModelConfig, data: dict[str, torch.Tensor], variant: str = "") -> tuple[Model, Any]:
    weights = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    prefix = f"{variant}/param/"
    weights |= {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    model = build_model(config).double()
    table = model.pos_embed.clone()
    load_official(model, {k: v.double() for k, v in weights.items()}, source=config.method)
    assert torch.equal(model.pos_embed, table), "our sin-cos table differs from the official one"
    teacher = data["in/teacher_out"].double() if config.loss == "cosine" else None
    out = model(data["in/imgs"].double(), noise=data["in/noise"], teacher=teacher, predictions=True)
    out.loss.backward()
    return model, out


def check_gradients(model: Model, data: dict[str, torch.Tensor], prefix: str, rel: float) -> None:
    names = {theirs: ours for ours, theirs in official_names(model).items()}
    parameters = dict(model.named_parameters())
    keys = [key for key in data if key.startswith(prefix)]
    assert keys, f"no gradients under {prefix}"
    for key in keys:
        got = parameters[names[key.removeprefix(prefix)]].grad
        torch.testing.assert_close(got, data[key].double(), rtol=rel, atol=rel * got.norm().item())


def test_mae() -> None:
    data = arrays("mae")
    model, out = run(MAE, data)
    assert [x.item() for x in out.losses.values()] == pytest.approx(LOSSES["mae"], rel=1e-10)
    torch.testing.assert_close(
        out.predictions["block04"], data["out/pred"].double(), rtol=1e-5, atol=1e-5
    )
    images = data["in/imgs"].double()
    target = reference.normalize_patches(reference.patchify(images, 8))
    torch.testing.assert_close(target, data["out/target_norm"].double(), rtol=1e-5, atol=1e-5)
    check_gradients(model, data, "grad/", 1e-6)


def test_deepmim_cosine() -> None:
    data = arrays("deepmim")
    config = ModelConfig(loss="cosine", **DEEPMIM, **TINY)
    model, out = run(config, data)
    assert [x.item() for x in out.losses.values()] == pytest.approx(LOSSES["deepmim"], rel=1e-10)
    for number, pred in enumerate(out.predictions.values(), start=1):
        expected = data[f"out/pred{number}_first16ch"][:, 1:].double()
        torch.testing.assert_close(pred[..., :16], expected, rtol=1e-5, atol=1e-5)
    check_gradients(model, data, "grad/", 1e-6)


def test_deepmim_pixel() -> None:
    data = arrays("deepmim")
    model, out = run(ModelConfig(**DEEPMIM, **TINY), data, variant="pixel")
    assert [x.item() for x in out.losses.values()] == pytest.approx(LOSSES["pixel"], rel=1e-10)
    check_gradients(model, data, "pixel/grad/", 1e-6)


def test_mirl() -> None:
    data = arrays("mirl")
    model, out = run(MIRL, data)
    assert [x.item() for x in out.losses.values()] == pytest.approx(LOSSES["mirl"], rel=1e-5)
    assert out.loss.item() == pytest.approx(1.1813303304889697, rel=1e-7)
    for number, pred in enumerate(out.predictions.values()):
        expected = data[f"out/pred{number}"].double()
        torch.testing.assert_close(pred[..., :16], expected, rtol=1e-5, atol=1e-5)
    check_gradients(model, data, "grad/", 1e-5)
