"""Pixels, patches and the statistics that images are normalized with.

Legend: B images, C channels, L patches, p patch side, P = p * p * C.
"""

from __future__ import annotations

from typing import Any

import torch
from deepmim_kernels import reference
from torch import Tensor

# Statistics of ImageNet, with which MAE, DeepMIM and MIRL normalize their input.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

patchify = reference.patchify
"""Images [B, C, H, W] -> patches [B, L, P], pixels in the order (row, column, channel)."""


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Inverse of `patchify` for square images: [B, L, P] -> [B, C, H, W]."""
    b, num_patches, _ = patches.shape
    p, side = patch_size, round(num_patches**0.5)
    x = patches.reshape(b, side, side, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * p, side * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, L, 1] of each patch: unbiased variance, plus 1e-6."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def pixel_scale(images: Tensor) -> dict[str, Any]:
    """Arguments with which a kernel normalizes uint8 images; none for normalized ones."""
    if images.is_floating_point():
        return {}
    return {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 by ImageNet's statistics; floating images as they are."""
    if images.is_floating_point():
        return images
    return reference.normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.float32)


def to_pixels(images: Tensor) -> Tensor:
    """Inverse of `normalize`: float [B, 3, H, W] in [0, 1], clipped."""
    mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean).clamp(0, 1)
