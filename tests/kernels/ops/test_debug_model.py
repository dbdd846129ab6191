"""The debug preset trained with the fused kernels and with the reference: the same loss curve."""

from typing import Any

import pytest
import torch
from deepmim_kernels import _dispatch, api

from deepmim_scale.models import build_model, local_backward
from deepmim_scale.presets import debug
from deepmim_scale.train.optim import parameter_groups

BATCH = 1


def loss_curve(
    backend: str, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], int]:
    """Losses, and how often a fused loss kernel was called."""
    calls = 0
    fused_loss = api.masked_mse_op

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return fused_loss(*arguments)

    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", backend)
    monkeypatch.setattr(api, "masked_mse_op", counted)
    model = build_model(debug)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(num_steps):
        images = torch.randint(0, 256, (BATCH, 3, 64, 64), generator=generator, dtype=torch.uint8)
        noise = torch.rand(BATCH, model.config.num_patches, generator=generator)
        losses.append(local_backward(model, images, noise=noise).loss.item())
        optimizer.step()
        optimizer.zero_grad()
    monkeypatch.undo()
    return losses, calls


@pytest.mark.parametrize(
    "num_steps", [3, pytest.param(50, marks=pytest.mark.soak)], ids=["short", "50 steps"]
)
def test_same_loss_curve(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, plain_calls = loss_curve("torch", num_steps, monkeypatch)
    fused, fused_calls = loss_curve("triton", num_steps, monkeypatch)
    worst = max(abs(a - b) for a, b in zip(plain, fused, strict=True))
    print(f"largest difference over {num_steps} steps: {worst:.2e} (loss {plain[-1]:.3f})")
    assert (plain_calls, fused_calls) == (0, 4 * num_steps)
    assert worst < 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(128, 128), (32, 32), (64, 128), (32, 128)])
def test_images_of_another_size_are_an_error(
    backend: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(32, 128) has as many patches as the model and would pass for one of its images."""
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", backend)
    model = build_model(debug().model)
    images = torch.zeros(BATCH, 3, *shape, dtype=torch.uint8)
    noise = torch.rand(BATCH, model.config.num_patches)
    height, width = shape
    message = f"^images are {height}x{width}: must be img_size=64; resize them$"
    with pytest.raises(ValueError, match=message):
        local_backward(model, images, noise=noise)
