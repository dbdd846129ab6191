"""MAE's parameter groups, learning-rate rule and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from deepmim_scale.config import RunConfig
from deepmim_scale.models import build_model
from deepmim_scale.presets import debug, debug_mirl, load_preset
from deepmim_scale.train.optim import learning_rate, parameter_groups, peak_learning_rate


@pytest.mark.parametrize("preset", [debug, debug_mirl])
def test_groups(preset: Callable[[], RunConfig]) -> None:
    model = build_model(preset, device="meta")
    groups = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    plain = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    decayed_names = {names[id(p)] for p in decayed}
    assert {n for n in decayed_names if n.endswith("_token")} == {
        n for n, p in model.named_parameters() if n.endswith("_token")
    }, "CLS and mask tokens are decayed"
    assert all(names[id(p)].endswith("bias") or p.ndim == 1 for p in plain)
    count = sum(p.requires_grad for p in model.parameters())
    assert len(plain) + len(decayed) == count
    rounded = {names[id(p)] for g in groups if g["is_rounded"] for p in g["params"]}
    # A weight norm scales in fp32, so its matrix must not be rounded before.
    kept = ("_token", "original1", "bias")
    expected = {n for n in decayed_names if not n.endswith(kept)}
    assert rounded == expected


def test_learning_rate() -> None:
    peak = peak_learning_rate(load_preset("mae_vit_b_12"), 4096)
    assert peak == pytest.approx(2.4e-3)

    def rate(epoch: float) -> float:
        return learning_rate(peak, epoch, warmup_epochs=40, total_epochs=800)

    assert rate(0) == 0
    assert rate(10) == pytest.approx(peak / 4)
    assert rate(40) == pytest.approx(peak)
    assert rate(420) == pytest.approx(peak / 2)
    assert rate(40 + 760 / 4) == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(800) == pytest.approx(0, abs=1e-12)
    assert rate(900) == pytest.approx(0, abs=1e-12)
    assert learning_rate(1.0, 0.0, warmup_epochs=0, total_epochs=5) == 1.0
