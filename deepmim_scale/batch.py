"""One micro-batch, as every stage has it, and the mask that its noise stands for.

Legend: B images, C channels, H x W an image, L patches, K visible patches, P target width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one micro-batch with what is drawn and known for each of them."""

    images: Tensor
    """uint8 or uint16, or floating and normalized, [B, C, H, W]."""
    noise: Tensor
    """float32 [B, L] in [0, 1); its stable argsort is the mask."""
    sample_ids: Tensor | None = None
    """int64 [B], places in the source's order."""
    labels: Tensor | None = None
    """int64 [B], classes."""
    teacher: Tensor | None = None
    """Targets given from outside instead of being made by the objective's teacher."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting for the host."""
        return replace(
            self, **{name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Masking(NamedTuple):
    """Which patches stay: the K with the smallest noise, in ascending order of noise."""

    ids_visible: Tensor
    """[B, K] patch numbers in shuffled order."""
    ids_masked: Tensor
    """[B, L - K] patch numbers in shuffled order."""
    ids_restore: Tensor
    """[B, L] place of each patch in the shuffled order."""


def masking_from_noise(noise: Tensor, num_visible: int) -> Masking:
    """Masking of noise [B, L], by a stable sort so that ties fall alike everywhere.

    Source: facebookresearch/mae, models_mae.py, random_masking.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :num_visible], ids_shuffle[:, num_visible:], ids_restore)


def expect_shape(name: str, tensor: Tensor, legend: str, shape: tuple[int, ...]) -> None:
    """ValueError that names both shapes, unless a tensor from outside has the expected one."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}; must be {legend}={list(shape)}")
