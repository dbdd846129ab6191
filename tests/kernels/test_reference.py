"""The reference against loops over single patches in float64, and its use on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from deepmim_kernels import decoder_assemble, gather_patches, masked_cosine, masked_mse
from torch import Tensor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH, PATCH, ROWS, COLUMNS = 2, 4, 2, 3
PATCHES = ROWS * COLUMNS


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (BATCH, 3, ROWS * PATCH, COLUMNS * PATCH), dtype=torch.uint8)


def pixels_by_loop(images: Tensor, patch: int) -> np.ndarray:
    """Normalized pixels of one patch of every image, (row, column, channel) order."""
    top, left = patch // COLUMNS * PATCH, patch % COLUMNS * PATCH
    return np.array(
        [
            [
                (image[c, top + y, left + x].item() / 255 - MEAN[c]) / STD[c]
                for y in range(PATCH)
                for x in range(PATCH)
                for c in range(3)
            ]
            for image in images
        ]
    )


def loss_by_loop(
    pred: np.ndarray, images: Tensor, mask: np.ndarray, norm_pix: bool
) -> tuple[float, np.ndarray]:
    """MAE's loss and the weighted rows, one patch at a time."""
    rows = np.zeros(mask.shape)
    for n in range(PATCHES):
        for b, target in enumerate(pixels_by_loop(images, n)):
            if norm_pix:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            rows[b, n] = mask[b, n] * np.mean((pred[b, n] - target) ** 2)
    return rows.sum() / mask.sum(), rows


@pytest.mark.parametrize("norm_pix", [True, False])
def test_masked_mse_equals_loops(images: Tensor, norm_pix: bool) -> None:
    pred = torch.randn(BATCH, PATCHES + 1, PATCH * PATCH * 3, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    kwargs: dict[str, Any] = {
        "patch_size": PATCH,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        "norm_pix": norm_pix,
        "return_rows": True,
    }
    expected, expected_rows = loss_by_loop(pred[:, 1:].numpy(), images, mask.numpy(), norm_pix)
    loss, rows = masked_mse(pred, images, mask=mask, prefix_tokens=1, **kwargs)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-12)

    ids = mask.nonzero()[:, 1].view(BATCH, 4)
    packed = pred[:, 1:].gather(1, ids.unsqueeze(-1).expand(-1, -1, pred.shape[2]))
    assert masked_mse(packed, images, ids=ids, **kwargs)[0].item() == pytest.approx(
        expected, rel=1e-12
    )
    # A pair that sums to pred, and a hybrid target that is the plain one, are the same loss.
    half = packed / 2
    assert masked_mse(half, images, ids=ids, paired_pred=half, **kwargs)[0].item() == pytest.approx(
        expected, rel=1e-12
    )
    mixed, _ = masked_mse(packed, images, ids=ids, mix_target=torch.randn_like(packed), **kwargs)
    assert mixed.item() == pytest.approx(expected, rel=1e-12)


def test_hybrid_target_mixes_in_the_space_of_the_prediction(images: Tensor) -> None:
    pred, generator = torch.randn(2, BATCH, PATCHES, PATCH * PATCH * 3, dtype=torch.float64)
    kwargs: dict[str, Any] = {
        "mask": torch.ones(BATCH, PATCHES),
        "patch_size": PATCH,
        "pixel_mean": MEAN,
        "pixel_std": STD,
    }
    # p - (a t + (1 - a) g) = (p - (1 - a) g + (1 - a) t) - t, checked through the plain loss.
    zero = masked_mse(generator, images, mix_target=generator, mix_alpha=0.0, **kwargs)
    assert zero.item() == 0.0
    target = torch.zeros_like(pred, requires_grad=True)
    masked_mse(target, images, **kwargs).backward()
    exact = -target.grad * pred.numel() / 2
    mixed = masked_mse(pred, images, mix_target=generator, mix_alpha=0.25, **kwargs)
    expected = (pred - 0.25 * exact - 0.75 * generator).square().mean()
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=0)


def test_masked_cosine_equals_loops() -> None:
    pred, teacher = torch.randn(2, BATCH, PATCHES + 1, 10, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    total = 0.0
    for b, n in mask.nonzero().tolist():
        p, t = pred[b, n + 1].numpy(), teacher[b, n + 1].numpy()
        total += 2 - 2 * float(p @ t) / np.sqrt(float(p @ p) * float(t @ t))
    prefixes = {"prefix_tokens": 1, "teacher_prefix_tokens": 1}
    loss = masked_cosine(pred, teacher, mask=mask, **prefixes)
    assert loss.item() == pytest.approx(total / 8, rel=1e-12)
    ids = mask.nonzero()[:, 1].view(BATCH, 4)
    packed = pred[:, 1:].gather(1, ids.unsqueeze(-1).expand(-1, -1, 10))
    loss = masked_cosine(packed, teacher, ids=ids, teacher_prefix_tokens=1)
    assert loss.item() == pytest.approx(total / 8, rel=1e-12)


def test_decoder_assemble_equals_loops() -> None:
    tokens, mask_token, pos = torch.randn(2, 3, 5), torch.randn(1, 1, 5), torch.randn(1, 7, 5)
    ids_restore = torch.stack([torch.randperm(6) for _ in range(2)])
    out = decoder_assemble(tokens, mask_token, pos, ids_restore)
    for b in range(2):
        assert torch.equal(out[b, 0], tokens[b, 0] + pos[0, 0])
        for n, rank in enumerate(ids_restore[b].tolist()):
            token = tokens[b, rank + 1] if rank < 2 else mask_token[0, 0]
            assert torch.equal(out[b, n + 1], token + pos[0, n + 1])


def test_gather_patches_is_the_patch_convolution(images: Tensor) -> None:
    conv = torch.nn.Conv2d(3, 11, PATCH, PATCH, dtype=torch.float64)
    x = torch.stack([(images[:, c] / 255.0 - MEAN[c]).double() / STD[c] for c in range(3)], dim=1)
    ids = torch.tensor([[5, 0], [2, 2]])
    expected = conv(x).flatten(2).transpose(1, 2)
    expected = expected.gather(1, ids.unsqueeze(-1).expand(-1, -1, 11))
    patches = gather_patches(x, ids, patch_size=PATCH)
    actual = torch.nn.functional.linear(patches, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    from_bytes = gather_patches(images, ids, patch_size=PATCH, pixel_mean=MEAN, pixel_std=STD)
    torch.testing.assert_close(from_bytes.double(), patches, rtol=1e-5, atol=1e-6)


def test_gradients_in_float64(images: Tensor) -> None:
    pred, other = (torch.randn(BATCH, 2, 48, dtype=torch.float64, requires_grad=True) for _ in "ab")
    ids = torch.tensor([[5, 0], [2, 3]])
    scale = {"pixel_mean": MEAN, "pixel_std": STD}
    assert torch.autograd.gradcheck(
        lambda p, q: masked_mse(p, images, ids=ids, patch_size=PATCH, paired_pred=q, **scale),
        (pred, other),
        fast_mode=True,
    )
    assert torch.autograd.gradcheck(
        lambda p: masked_cosine(p, other.detach(), ids=ids % 2), pred, fast_mode=True
    )
    tokens, mask_token, pos = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (1, 1, 4), (1, 7, 4))
    )
    restore = torch.stack([torch.randperm(6) for _ in range(2)])
    assert torch.autograd.gradcheck(
        lambda *leaves: decoder_assemble(*leaves, restore), (tokens, mask_token, pos)
    )


def test_nothing_masked_is_zero(images: Tensor) -> None:
    pred = torch.randn(BATCH, PATCHES, 48, requires_grad=True)
    mask = torch.zeros(BATCH, PATCHES)
    loss = masked_mse(pred, images, mask=mask, patch_size=PATCH, pixel_mean=MEAN, pixel_std=STD)
    loss.backward()
    assert loss.item() == 0.0
    assert not pred.grad.any()
