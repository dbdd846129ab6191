"""The mask's noise, equal wherever it is computed: every stage draws its own, nothing is sent.

Legend: B micro-batch, L patches of an image.
"""

from __future__ import annotations

import numpy as np

from deepmim_scale.data.philox import TRAIN_MASK, philox

LANES = 4


def mask_noise(
    seed: int, epoch: int, sample_ids: np.ndarray, num_patches: int, stream: int = TRAIN_MASK
) -> np.ndarray:
    """Noise of the patches, float32 [B, L] in [0, 1) with 24 bits; its stable argsort is the mask.

    Patch p of a sample takes lane p % 4 of philox(seed, p // 4, sample id, epoch, stream).
    """
    draws = np.arange(-(-num_patches // LANES))
    lanes = philox(seed, draws, np.asarray(sample_ids)[:, None], epoch, stream)
    integers = np.stack(lanes, axis=-1).reshape(-1, LANES * len(draws))[:, :num_patches]
    return (integers >> 8).astype(np.float32) * np.float32(2.0**-24)
