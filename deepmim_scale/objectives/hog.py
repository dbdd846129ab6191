"""Target `hog`: histograms of oriented gradients (MaskFeat, Wei et al., CVPR 2022, section 3.3).

Each channel's gradient votes with its size into 9 unsigned orientations of its cell of 8 x 8
pixels (a patch's side where that is smaller). A cell's histogram has unit length; a patch's target
joins its cells and channels. Legend: B images, C channels, L patches, H x W an image, c cells.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deepmim_scale.methods.base import require_divisible
from deepmim_scale.objectives.base import Objective, ObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor

    from deepmim_scale.config import ModelConfig

BINS = 9
CELL = 8


def cell_side(model: ModelConfig) -> int:
    """Side of a cell, pixels."""
    return min(CELL, model.patch_size)


def hog_width(model: ModelConfig) -> int:
    """Values of a patch: channels x bins x cells."""
    return model.in_chans * BINS * (model.patch_size // cell_side(model)) ** 2


def hog(images: Tensor, patch_size: int, cell: int) -> Tensor:
    """Images [B, C, H, W] -> [B, L, C * 9 * c * c], c = patch_size / cell."""
    import torch
    from torch.nn import functional

    # Central differences; the border repeats its pixels, as MaskFeat's reflection nearly does.
    padded = functional.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    # Unsigned: a gradient and its opposite are one orientation. The last bin may be met exactly.
    angle = torch.atan2(dy, dx).remainder(math.pi) * (BINS / math.pi)
    bins = angle.floor().long().clamp_(max=BINS - 1)
    votes = images.new_zeros((*images.shape[:2], BINS, *images.shape[2:]), dtype=torch.float32)
    votes.scatter_(2, bins.unsqueeze(2), torch.hypot(dx, dy).unsqueeze(2))
    histograms = functional.avg_pool2d(votes.flatten(0, 1), cell) * cell**2
    histograms = functional.normalize(histograms, dim=1)
    # [B, C, bins, rows of patches, c, columns of patches, c] -> a row per patch.
    c, rows, columns = patch_size // cell, *(side // patch_size for side in images.shape[2:])
    parts = histograms.reshape(len(images), -1, BINS, rows, c, columns, c)
    return parts.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def _check(model: ModelConfig) -> None:
    require_divisible("patch_size", model.patch_size, "a HOG cell's side", cell_side(model))


def _build(model: ModelConfig, teacher: object) -> Objective:
    from deepmim_scale.objectives.features import SquaredErrorObjective

    return SquaredErrorObjective(
        lambda images: hog(images, model.patch_size, cell_side(model)), model.pixel_statistics
    )


SPEC = ObjectiveSpec("hog", hog_width, _build, check_model=_check)
