"""Rows of weight 0 reach neither loss nor gradient, whatever they hold, on both paths.

Legend: B images, L patches, D features. Every row that counts is finite.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from deepmim_kernels import masked_cosine, masked_mse
from torch import Tensor

BATCH, SIDE, PATCH = 2, 3, 4
PATCHES, DIM = SIDE * SIDE, 3 * PATCH * PATCH
MASKS = {
    "bool": torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0, 1, 0]]).bool(),
    "fractional": torch.tensor(
        [[0.3, 0, 1, 0.5, 0, 2, 0, 0, 1e-3], [0, 1, 0.7, 0, 1, 1, 0, 0.25, 0]]
    ),
    "one image": torch.tensor([[1.0] * PATCHES, [0.0] * PATCHES]),
    "none": torch.zeros(BATCH, PATCHES),
}
FILLS = {"nan": float("nan"), "inf": float("inf"), "zero": 0.0}


class Result(NamedTuple):
    """A loss, its rows [B, L] and the gradient [B, 1 + L, D] of every prediction."""

    loss: Tensor
    rows: Tensor
    gradients: list[Tensor]


def poison(x: Tensor, mask: Tensor, fill: float | None) -> Tensor:
    """x [B, 1 + L, D] with `fill` in CLS and in the rows of weight 0; as it is for None."""
    if fill is None:
        return x
    ignored = torch.cat([torch.ones(BATCH, 1).bool(), mask == 0], dim=1)
    return x.masked_fill(ignored.unsqueeze(-1).to(x.device), fill)


def random_tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 1 + PATCHES, DIM, generator=generator)


def finish(loss: Tensor, rows: Tensor, leaves: list[Tensor]) -> Result:
    (loss * 3).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves), "a prediction got no gradient"
    return Result(loss.detach(), rows, gradients)


def run_mse(
    mask: Tensor,
    fill: float | None,
    stored: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Result:
    """`masked_mse` of a pair against a mixed target, with `fill` in all that weighs nothing.

    Predictions have the values of `stored` in `dtype`.
    """
    pixels = poison(random_tokens(0), mask, fill)[:, 1:]
    grid = pixels.view(BATCH, SIDE, SIDE, PATCH, PATCH, 3)
    images = grid.permute(0, 5, 1, 3, 2, 4).reshape(BATCH, 3, SIDE * PATCH, SIDE * PATCH)
    pred, pair, mix = (poison(random_tokens(seed), mask, fill) for seed in (1, 2, 3))
    leaves = [x.to(device, stored).to(dtype).requires_grad_() for x in (pred, pair)]
    loss, rows = masked_mse(
        leaves[0],
        images.to(device),
        mask=mask.to(device),
        patch_size=PATCH,
        prefix_tokens=1,
        paired_pred=leaves[1],
        mix_target=mix.to(device, stored),
        mix_alpha=0.25,
        return_rows=True,
        backend=backend,
    )
    return finish(loss, rows, leaves)


def run_cosine(
    mask: Tensor,
    fill: float | None,
    stored: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Result:
    """`masked_cosine` in the manner of `run_mse`, with `fill` on both sides."""
    pred, teacher = (poison(random_tokens(seed), mask, fill) for seed in (1, 2))
    leaf = pred.to(device, stored).to(dtype).requires_grad_()
    loss, rows = masked_cosine(
        leaf,
        teacher.to(device),
        mask=mask.to(device),
        prefix_tokens=1,
        teacher_prefix_tokens=1,
        return_rows=True,
        backend=backend,
    )
    return finish(loss, rows, [leaf])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("run", [run_mse, run_cosine])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_weighted_rows_count(
    backend: str,
    run: Callable[..., Result],
    fill: str,
    mask: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Callable[..., None],
) -> None:
    # The judge sees finite inputs everywhere, rounded to the same dtype.
    expected = run(MASKS[mask], None, dtype, torch.float64, device, "torch")
    actual = run(MASKS[mask], FILLS[fill], dtype, dtype, device, backend)
    assert_close("loss", actual.loss, expected.loss, torch.float32)
    assert_close("rows", actual.rows, expected.rows, torch.float32)
    for gradient, exact in zip(actual.gradients, expected.gradients, strict=True):
        assert_close("gradient", gradient, exact, dtype)
        ignored = torch.cat([torch.ones(BATCH, 1).bool(), MASKS[mask] == 0], dim=1)
        assert not gradient[ignored.to(device)].any()


@pytest.mark.parametrize("run", [run_mse, run_cosine])
def test_float64_reference_keeps_its_bits(run: Callable[..., Result], device: torch.device) -> None:
    dtype = torch.float64
    clean, filled = (
        run(MASKS["fractional"], fill, dtype, dtype, device, "torch")
        for fill in (None, float("nan"))
    )
    assert torch.equal(clean.loss, filled.loss)
    assert torch.equal(clean.rows, filled.rows)
    for first, second in zip(clean.gradients, filled.gradients, strict=True):
        assert torch.equal(first, second)
