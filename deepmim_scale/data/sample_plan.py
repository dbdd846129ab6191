"""Which images a step sees, and how each is cropped and flipped: a function of the seed alone.

Legend: G global batch, B micro-batch, M micro-batches per step, D replicas; G = B * M * D.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from deepmim_scale.data.philox import CROP, FLIP, ORDER, philox, scale_to, uniform
from deepmim_scale.errors import UserError

CROP_TRIES = 10
RATIOS = (3 / 4, 4 / 3)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Order of an epoch, int64 [num_samples]: ids sorted by their own random 64-bit keys."""
    keys = np.empty(num_samples, np.uint64)
    block = 1 << 14  # the working set stays in the processor's cache
    for start in range(0, num_samples, block):
        ids = np.arange(start, min(start + block, num_samples))
        high, low, _, _ = philox(seed, 0, ids, epoch, ORDER)
        keys[start : start + block] = high.astype(np.uint64) << np.uint64(32) | low
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class SamplePlan:
    """Order of the samples for ever: each once per epoch, the incomplete last batch dropped.

    Raises UserError if there are fewer samples than one global batch.
    """

    num_samples: int
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise UserError(
                f"global_batch={self.global_batch}: larger than the data set of "
                f"{self.num_samples} images; use at most {self.num_samples} or more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.num_samples // self.global_batch

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step and the step's number within it, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def sample_ids(self, step: int) -> np.ndarray:
        """Ids of a step's global batch, int64 [G]."""
        epoch, step_in_epoch = self.locate(step)
        start = step_in_epoch * self.global_batch
        return permutation(self.seed, epoch, self.num_samples)[start : start + self.global_batch]

    def micro_batch(
        self, step: int, microbatch: int, dp_rank: int, num_microbatches: int, num_replicas: int
    ) -> np.ndarray:
        """Ids of one micro-batch, int64 [B]: slice microbatch * D + dp_rank of the global batch."""
        parts = num_microbatches * num_replicas
        assert self.global_batch % parts == 0, f"{self.global_batch} samples in {parts} parts"
        return self.sample_ids(step).reshape(parts, -1)[microbatch * num_replicas + dp_rank]

    def replacement(self, step: int, sample_id: int, attempt: int) -> int:
        """The sample `attempt` places after `sample_id` in the epoch's order (around its end)."""
        order = permutation(self.seed, self.locate(step)[0], self.num_samples)
        place = int(np.flatnonzero(order == sample_id)[0])
        return int(order[(place + attempt) % self.num_samples])


def crops(
    seed: int,
    epoch: int,
    sample_ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    min_area: float,
) -> np.ndarray:
    """Random crops, int32 [B, 4] (top, left, height, width), of images of the given sizes [B].

    The distribution is torchvision's RandomResizedCrop.get_params: an area from [min_area, 1], a
    ratio from [3/4, 4/3] (log-uniform), the first of 10 tries that fits, else a centered crop.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    tries = np.arange(CROP_TRIES)[:, None]
    area, ratio, top, left = philox(seed, tries, sample_ids, epoch, CROP)  # each [tries, B]
    target = heights * widths * (min_area + (1 - min_area) * uniform(area))
    low, high = (math.log(bound) for bound in RATIOS)
    aspect = np.exp(low + (high - low) * uniform(ratio))
    width = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    # The fallback is the last row: the largest centered crop of an allowed ratio.
    width = np.vstack([width, np.minimum(widths, np.rint(heights * RATIOS[1]).astype(np.int64))])
    height = np.vstack([height, np.minimum(heights, np.rint(widths / RATIOS[0]).astype(np.int64))])
    chosen = np.where(fits.any(0), fits.argmax(0), CROP_TRIES)
    columns = np.arange(len(sample_ids))
    height, width = height[chosen, columns], width[chosen, columns]
    free_rows, free_columns = heights - height, widths - width
    try_ = np.minimum(chosen, CROP_TRIES - 1)
    centered = chosen == CROP_TRIES
    top = np.where(centered, free_rows // 2, scale_to(top[try_, columns], free_rows + 1))
    left = np.where(centered, free_columns // 2, scale_to(left[try_, columns], free_columns + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.int32)


def flips(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Whether each image is mirrored, bool [B], with probability 1/2."""
    return philox(seed, 0, sample_ids, epoch, FLIP)[0] >= 1 << 31
