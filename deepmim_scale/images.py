"""Pixels, patches and the statistics that images are normalized with.

Legend: B images, C channels, L patches, p patch side, P = p * p * C.
"""

from __future__ import annotations

from typing import Any

import torch
from deepmim_kernels import reference
from torch import Tensor

from deepmim_scale.image_format import IMAGENET, PixelStatistics

IMAGENET_MEAN, IMAGENET_STD = IMAGENET

patchify = reference.patchify
"""Images [B, C, H, W] -> patches [B, L, P], pixels in the order (row, column, channel)."""


def unpatchify(
    patches: Tensor, patch_size: int, channels: int, grid: tuple[int, int] | None = None
) -> Tensor:
    """Inverse of `patchify`: [B, L, P] -> [B, C, H, W] of rows x columns (default: a square)."""
    b, num_patches, _ = patches.shape
    p, side = patch_size, round(num_patches**0.5)
    rows, columns = grid or (side, side)
    x = patches.reshape(b, rows, columns, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, rows * p, columns * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, L, 1] of each patch: unbiased variance, plus 1e-6."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def pixel_scale(images: Tensor, statistics: PixelStatistics = IMAGENET) -> dict[str, Any]:
    """Arguments with which a kernel normalizes integer images; none for normalized ones."""
    if images.is_floating_point():
        return {}
    return {"pixel_mean": statistics.mean, "pixel_std": statistics.std}


def normalize(images: Tensor, statistics: PixelStatistics = IMAGENET) -> Tensor:
    """uint8 or uint16 [B, C, H, W] -> float32 by the statistics; floating images as they are.

    ValueError for statistics of another number of channels.
    """
    if images.is_floating_point():
        return images
    if len(statistics.mean) != images.shape[1]:
        raise ValueError(
            f"pixel_mean: has {len(statistics.mean)} values, images {images.shape[1]} channels; "
            "give one value for each"
        )
    return reference.normalize(images, *statistics, torch.float32)


def to_pixels(images: Tensor, statistics: PixelStatistics = IMAGENET) -> Tensor:
    """Inverse of `normalize`: float [B, C, H, W] in [0, 1], clipped."""
    mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in statistics)
    return (images * std + mean).clamp(0, 1)
