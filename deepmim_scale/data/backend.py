"""What a decoding backend is.

A backend is a function Iterator[DecodeRequest] -> Iterator[(DecodeRequest, images)] that holds the
source it reads from. It may read ahead, keeps the order, and raises BadImage at the micro-batch
with the bad file.
Legend: B micro-batch, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from deepmim_scale.errors import RunFailure


class BadImage(RunFailure):
    """An image that cannot be decoded; the message names the file where the decoder does."""


@dataclass(frozen=True)
class DecodeRequest:
    """One micro-batch to decode."""

    ids: np.ndarray
    """Sample ids, int64 [B]."""
    boxes: np.ndarray
    """Crops (top, left, height, width), int32 [B, 4]."""
    flips: np.ndarray
    """Whether to mirror, bool [B]."""


Backend = Callable[[Iterator[DecodeRequest]], Iterator[tuple[DecodeRequest, torch.Tensor]]]
