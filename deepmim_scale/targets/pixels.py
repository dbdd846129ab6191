"""Pixels of masked patches as targets (facebookresearch/mae models_mae.py, forward_loss).

Legend: B images, C channels, L patches, K' masked patches, p patch side, P = p * p * C.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] -> patches [B, L, P], pixels in the order (row, column, channel)."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Inverse of `patchify` for square images: [B, L, P] -> [B, C, H, W]."""
    b, num_patches, _ = patches.shape
    p, side = patch_size, round(num_patches**0.5)
    x = patches.reshape(b, side, side, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * p, side * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, L, 1] of each patch: unbiased variance, plus 1e-6."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def masked_pixels(images: Tensor, ids: Tensor, *, patch_size: int, norm_pix: bool) -> Tensor:
    """Target [B, K', P] of the patches ids [B, K'], normalised patch by patch if asked."""
    patches = patchify(images, patch_size)
    patches = patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    if not norm_pix:
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def pixel_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of masked patches [B, K', P]; at least float32 inside."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    return (pred.to(dtype) - target.to(dtype)).square().mean(-1).mean()


# Statistics of ImageNet, with which MAE, DeepMIM and MIRL normalise their input.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(1, -1, 1, 1)


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, normalised by ImageNet's statistics."""
    mean, std = _per_channel(IMAGENET_MEAN, images), _per_channel(IMAGENET_STD, images)
    return (images.float() / 255 - mean) / std


def to_pixels(images: Tensor) -> Tensor:
    """Inverse of `normalise`: float [B, 3, H, W] in [0, 1], clipped."""
    mean, std = _per_channel(IMAGENET_MEAN, images), _per_channel(IMAGENET_STD, images)
    return (images * std + mean).clamp(0, 1)
