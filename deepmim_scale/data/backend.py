"""What a decoding backend is.

A backend is a function Iterator[DecodeRequest] -> Iterator[(DecodeRequest, images)] that holds the
source it reads from. It may read ahead, keeps the order, and raises BadImage at the micro-batch
with the bad file.
Legend: B micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from deepmim_scale.errors import RunFailure
from deepmim_scale.image_format import ImageFormat


class BadImage(RunFailure):
    """An image that cannot be decoded; the message names the file where the decoder does."""


class WrongPixels(BadImage):
    """An image of other channels or bits than the run takes."""


@dataclass(frozen=True)
class DecodeRequest:
    """One micro-batch to decode."""

    ids: np.ndarray
    """Sample ids, int64 [B]."""
    boxes: np.ndarray
    """Crops (top, left, height, width), int32 [B, 4]."""
    flips: np.ndarray
    """Whether to mirror, bool [B]."""


def pixel_dtype(image: ImageFormat) -> torch.dtype:
    """Of a batch's images."""
    return torch.uint16 if image.bits == 16 else torch.uint8


Backend = Callable[[Iterator[DecodeRequest]], Iterator[tuple[DecodeRequest, torch.Tensor]]]
