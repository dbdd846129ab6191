"""Random masking from per-patch noise (facebookresearch/mae models_mae.py, random_masking).

Legend: B images, L patches, K visible patches.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Masking(NamedTuple):
    """Which patches stay: the K with the smallest noise, in ascending order of noise."""

    ids_visible: Tensor
    """[B, K] patch numbers in shuffled order."""
    ids_masked: Tensor
    """[B, L - K] patch numbers in shuffled order."""
    ids_restore: Tensor
    """[B, L] place of each patch in the shuffled order."""


def masking_from_noise(noise: Tensor, num_visible: int) -> Masking:
    """Masking of noise [B, L]; the sort is stable so that ties fall alike everywhere."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :num_visible], ids_shuffle[:, num_visible:], ids_restore)
