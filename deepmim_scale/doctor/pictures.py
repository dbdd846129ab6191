"""A few images that every rank draws alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NUM_IMAGES = 64


def write_pictures(folder: Path) -> None:
    """Write JPEGs of noise."""
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg")
