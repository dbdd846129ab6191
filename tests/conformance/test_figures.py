"""Losses, gradients and training of the official MAE, DeepMIM and MIRL code, to 1e-9 in float64.

The scalars were printed by the official implementations (MIRL: confirmed by it in float32) for
weights, inputs and mask noise that follow from the formula in `stream` ... `table` below.
Sources: facebookresearch/mae efb2a80, OliverRensu/DeepMIM 7bf1e80, russellllaputa/MIRL 4cd33a5.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepmim_scale.checkpoint import load_official, official_names
from deepmim_scale.models import Model, ModelConfig, Output, build_model, local_backward
from deepmim_scale.train.optim import parameter_groups

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "figures.json").read_text())
PLAIN = [name for name in CASES if not name.startswith("train")]
TRAIN = [name for name in CASES if name.startswith("train")]


def stream(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    value = stream(name).standard_normal(shape)
    if "cls_token" in name or "mask_token" in name:
        value = 0.02 * value
    elif name.endswith(".bias"):
        value = 0.05 * value
    elif len(shape) == 1:
        value = 1 + 0.1 * value
    else:
        value = value / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32)).double()


def table(dim: int, side: int) -> torch.Tensor:
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    index = np.arange(side)
    column, row = np.tile(index, side)[:, None] * omega, np.repeat(index, side)[:, None] * omega
    rows = np.hstack([np.sin(column), np.cos(column), np.sin(row), np.cos(row)])
    return torch.from_numpy(np.vstack([np.zeros(dim), rows]).astype(np.float32)).double()[None]


def model_config(case: dict[str, Any]) -> ModelConfig:
    fields = dict(case["config"])
    name = fields.pop("model")
    fields["method"] = name.split("_")[0]
    fields["loss"] = "cosine" if name.endswith("cosine") else "pixel"
    if "taps_1based" in fields:
        fields["taps"] = fields.pop("taps_1based")
    if "segments" in fields:
        fields["num_segments"] = fields.pop("segments")
    for key in ("batch", "num_patches", "train", "blocks_per_segment"):
        fields.pop(key, None)
    return ModelConfig(**fields)


def prepared(case: dict[str, Any], **changes: Any) -> Model:
    config = model_config(case).replace(**changes)
    model = build_model(config).double()
    state = {}
    for ours, theirs in official_names(model).items():
        value = model.state_dict()[ours]
        if "pos_embed" in theirs:
            state[theirs] = table(value.shape[-1], config.grid_size)
        elif theirs.endswith("weight_g"):
            state[theirs] = torch.ones(value.numel(), dtype=torch.float64)
        else:
            state[theirs] = draw(theirs, tuple(value.shape))
    assert load_official(model, state, source=config.method) == []
    return model


def inputs(case: dict[str, Any], step: str = "") -> dict[str, torch.Tensor]:
    size, batch = case["config"]["img_size"], case["config"]["batch"]
    patches = case["config"]["num_patches"]
    images = stream(f"imgs{step}").standard_normal((batch, 3, size, size)).astype(np.float32)
    noise = stream(f"noise{step}").random_sample((batch, patches)).astype(np.float32)
    result = {"images": torch.from_numpy(images).double(), "noise": torch.from_numpy(noise)}
    if case["config"]["model"] == "deepmim_cosine":
        teacher = stream("teacher").standard_normal((batch, patches + 1, 512))
        result["teacher"] = torch.from_numpy(teacher.astype(np.float32)).double()
    return result


def check_losses(out: Output, total: float, parts: list[float] | None) -> None:
    assert out.loss.item() == pytest.approx(total, rel=1e-9)
    if parts is not None:
        assert [loss.item() for loss in out.losses.values()] == pytest.approx(parts, rel=1e-9)


def trainable(model: Model) -> dict[str, torch.nn.Parameter]:
    names = official_names(model)
    return {names[name]: p for name, p in model.named_parameters() if p.requires_grad}


def norm(tensors: Any) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


@pytest.mark.parametrize("masked_query", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_losses_and_gradients(name: str, masked_query: bool) -> None:
    case = CASES[name]
    model = prepared(case, masked_query=masked_query)
    parameters = trainable(model)
    assert sum(p.numel() for p in parameters.values()) == case["param_count"]
    assert sum(p.sum().item() for p in parameters.values()) == pytest.approx(
        case["param_sum"], abs=1e-9
    )
    batch = inputs(case)
    assert batch["images"].sum().item() == pytest.approx(case["input_sum"]["imgs"], rel=1e-9)
    out = model(**batch)
    check_losses(out, case["loss"], case.get("decoder_losses") or case.get("pair_losses"))
    out.loss.backward()
    got = {key: parameters[key].grad.norm().item() for key in case["grad_norm"]}
    assert got == pytest.approx(case["grad_norm"], rel=1e-9)
    total = norm(p.grad for p in parameters.values())
    assert total == pytest.approx(case["grad_norm_global"], rel=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_local_backward(name: str) -> None:
    case = CASES[name]
    model = prepared(case)
    out = local_backward(model, **inputs(case))
    check_losses(out, case["loss"], case.get("decoder_losses") or case.get("pair_losses"))
    got = {key: trainable(model)[key].grad.norm().item() for key in case["grad_norm"]}
    assert got == pytest.approx(case["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_predictions(name: str) -> None:
    case = CASES[name]
    out = prepared(case)(**inputs(case), predictions=True)
    assert out.predictions is not None
    norms = [p.norm().item() for p in out.predictions.values()]
    assert norms == pytest.approx(case["pred_norm"], rel=1e-9)
    for pred, expected, scale in zip(
        out.predictions.values(), case["pred_sum"], case["pred_norm"], strict=True
    ):
        assert pred.sum().item() == pytest.approx(expected, abs=1e-9 * scale)
    check_losses(out, case["loss"], case.get("decoder_losses") or case.get("pair_losses"))


@pytest.mark.parametrize("name", PLAIN)
def test_mask(name: str) -> None:
    case = CASES[name]
    batch = inputs(case)
    masking = build_model(model_config(case)).masking(batch["images"], batch["noise"])
    assert masking.ids_visible[0].tolist() == case["kept_ids_sample0"]
    assert masking.ids_masked.shape[1] == case["removed_per_sample"]


@pytest.mark.parametrize("name", TRAIN)
def test_training(name: str) -> None:
    case = CASES[name]
    model = prepared(case)
    parameters = trainable(model)
    start = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.05), lr=1e-3, betas=(0.9, 0.95), eps=1e-8
    )
    parts = case.get("decoder_losses_per_step") or case.get("pair_losses_per_step")
    for step, expected in enumerate(case["loss_per_step"]):
        out = local_backward(model, **inputs(case, str(step)))
        check_losses(out, expected, parts[step] if parts else None)
        optimizer.step()
        optimizer.zero_grad()
    got = {key: parameters[key].norm().item() for key in case["final_param_norm"]}
    assert got == pytest.approx(case["final_param_norm"], rel=1e-9)
    moved = {
        key: (parameters[key] - start[key]).norm().item()
        for key in case["final_minus_initial_norm"]
    }
    assert moved == pytest.approx(case["final_minus_initial_norm"], rel=1e-8)
    assert norm(p.detach() for p in parameters.values()) == pytest.approx(
        case["final_global_param_norm"], rel=1e-9
    )
