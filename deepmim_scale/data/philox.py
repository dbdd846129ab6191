"""Counter-based random integers: Philox4x32-10 in numpy, the same integers as Triton's tl.philox.

Every random choice of the data is philox(seed, draw, sample id, epoch, stream): a pure function,
so it is the same in every process, for every number of stages and after every restart.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
"""

from __future__ import annotations

import numpy as np

# Streams 0 to 15 belong to masks, so that models may draw several per image.
TRAIN_MASK, VALIDATION_MASK = 0, 1
ORDER, CROP, FLIP, SAMPLES = 16, 17, 18, 19
AUGMENT, MIX, DROP_PATH = 20, 21, 22

_MULTIPLY_0, _MULTIPLY_2 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_RAISE_0, _RAISE_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(
    seed: int, draw: object, sample_ids: object, epoch: object, stream: int
) -> tuple[np.ndarray, ...]:
    """Four uint32 arrays of the counters' broadcast shape; counters are taken modulo 2**32."""
    c0, c1, c2, c3 = (
        np.asarray(counter).astype(np.uint64) & _LOW
        for counter in (draw, sample_ids, epoch, stream)
    )
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product_0, product_2 = c0 * _MULTIPLY_0, c2 * _MULTIPLY_2
        c0 = product_2 >> _SHIFT ^ c1 ^ np.uint64(key_0)
        c2 = product_0 >> _SHIFT ^ c3 ^ np.uint64(key_1)
        c1, c3 = product_2 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _RAISE_0) & 0xFFFFFFFF, (key_1 + _RAISE_1) & 0xFFFFFFFF
    return tuple(lane.astype(np.uint32) for lane in np.broadcast_arrays(c0, c1, c2, c3))


def scale_to(random: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Map uint32 integers to int64 in [0, limit) by multiplication (no division, no rejection)."""
    return (random.astype(np.uint64) * limit.astype(np.uint64) >> _SHIFT).astype(np.int64)


def uniform(random: np.ndarray) -> np.ndarray:
    """Map uint32 integers to float64 in [0, 1)."""
    return random * 2.0**-32
