"""Models: sizes, presets, masked queries, and local backward against the joint reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepmim_scale.config import RunConfig
from deepmim_scale.images import patchify, unpatchify
from deepmim_scale.models import ModelConfig, build_model, local_backward
from deepmim_scale.presets import PRESETS, debug, debug_mae, debug_mirl

# (total, trainable) of the official constructors; the pixel row follows from its wider heads.
NUM_PARAMETERS = {
    "mae_vit_b_12": (111_907_840, 111_655_680),
    "mae_vit_l_24": (329_541_888, 329_239_296),
    "deepmim_clip_vit_b_12": (138_969_344, 138_717_184),
    "deepmim_vit_b_12": (139_494_656, 139_242_496),
    "mirl_vit_s_54": (113_673_984, 113_142_144),
    "mirl_vit_b_48": (397_169_408, 396_409_856),
}


def batch(config: ModelConfig, size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = config.img_size
    return {
        "images": torch.randn(size, config.in_chans, side, side, generator=generator),
        "noise": torch.rand(size, config.num_patches, generator=generator),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_meta(name: str) -> None:
    model = build_model(PRESETS[name], device="meta")
    if name in NUM_PARAMETERS:
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (total, trainable) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("masked_query", [False, True])
@pytest.mark.parametrize("preset", [debug, debug_mae, debug_mirl])
def test_local_backward_equals_joint(preset: Callable[[], RunConfig], masked_query: bool) -> None:
    config = preset().model.replace(masked_query=masked_query)
    model, inputs = build_model(config), batch(config)
    joint = model(**inputs)
    joint.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    local = local_backward(model, **inputs)
    assert torch.equal(local.loss, joint.loss.detach())
    different = [n for n, g in expected.items() if not torch.equal(model.get_parameter(n).grad, g)]
    assert not different, f"gradients differ: {different}"


@pytest.mark.parametrize("preset", [debug, debug_mae, debug_mirl])
def test_masked_query_is_exact(preset: Callable[[], RunConfig]) -> None:
    full = build_model(preset().model.replace(masked_query=False)).double()
    masked = build_model(preset().model.replace(masked_query=True)).double()
    inputs = {key: value.double() for key, value in batch(full.config).items()}
    expected, got = full(**inputs), masked(**inputs)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    expected.loss.backward()
    got.loss.backward()
    for (name, p), q in zip(full.named_parameters(), masked.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_predictions_agree_with_losses() -> None:
    model = build_model(debug)
    inputs = batch(model.config)
    plain, full = model(**inputs), model(**inputs, predictions=True)
    torch.testing.assert_close(full.loss, plain.loss)
    assert plain.predictions is None
    assert {name: tuple(p.shape) for name, p in full.predictions.items()} == dict.fromkeys(
        ["block03", "block06", "block09", "block12"], (3, 64, 192)
    )


def test_weights_do_not_depend_on_what_else_is_built() -> None:
    shallow = build_model(debug().model.replace(depth=12, taps=(6, 12)))
    deep = build_model(debug)
    assert torch.equal(shallow.blocks["5"].mlp.fc1.weight, deep.blocks["5"].mlp.fc1.weight)
    assert not torch.equal(deep.blocks["5"].mlp.fc1.weight, deep.blocks["6"].mlp.fc1.weight)


def test_deepmim_vit_b_12_runs_one_step() -> None:
    model = build_model(PRESETS["deepmim_vit_b_12"])
    out = local_backward(model, **batch(model.config, 2))
    assert torch.isfinite(out.loss)
    torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True).step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_cosine_needs_a_teacher() -> None:
    config = debug().model.replace(target="clip", teacher_dim=20)
    model = build_model(config)
    with pytest.raises(ValueError, match="teacher"):
        model(**batch(config))
    out = model(**batch(config), teacher=torch.randn(3, 65, 20))
    assert 0 < out.losses["block12"].item() < 4


@pytest.mark.parametrize("run", [lambda m, **kw: m(**kw), local_backward])
def test_shapes_are_checked(run: Callable[..., object]) -> None:
    config = debug().model.replace(target="clip", teacher_dim=20)
    model, inputs = build_model(config), batch(config)
    with pytest.raises(ValueError, match=r"noise: has shape \[64\]; must be \[B, L\]=\[3, 64\]"):
        run(model, **(inputs | {"noise": torch.rand(64)}))
    expected = r"teacher: has shape \[3, 64, 20\]; must be \[B, L\+1, P\]=\[3, 65, 20\]"
    with pytest.raises(ValueError, match=expected):
        run(model, **inputs, teacher=torch.randn(3, 64, 20))
    hybrid = build_model(debug().model.replace(hybrid_alphas=(0.0, 0.5, 1.0, 1.0)))
    expected = r"teacher: has shape \[3, 64, 192\]; must be \[B, L-K, P\]=\[3, 48, 192\]"
    with pytest.raises(ValueError, match=expected):
        run(hybrid, **inputs, teacher=torch.randn(3, 64, 192))


def test_build_model_takes_configs_and_presets() -> None:
    for given in (debug, debug(), debug().model):
        assert build_model(given, device="meta").config == debug().model


@pytest.mark.parametrize("taps", [None, 5, ("last",), (6.0, 12.0)])
def test_taps_that_are_no_numbers(taps: Any) -> None:
    with pytest.raises(ValueError, match=r"taps=.*: must be even, even:N"):
        ModelConfig(taps=taps)


def test_patchify_round_trip() -> None:
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, 3), images)
    # d = (row * p + column) * C + channel
    assert patches[1, 5, (2 * 4 + 3) * 3 + 1] == images[1, 1, 4 + 2, 8 + 3]


def test_the_seed_decides_the_weights() -> None:
    """Also beyond 32 bits of seed and name together, of which torch's generator reads 32 only."""
    config = debug().model
    first, again, other = (dict(build_model(config, seed=s).named_parameters()) for s in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        if weight.ndim > 1 and weight.requires_grad:
            assert not torch.equal(weight, other[name]), name
