"""Pictures of three classes that differ in color alone, for tests that need labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = "abc"


def write_color_classes(
    root: Path, *, train: int, val: int, size: tuple[int, int], noise: float = 20.0
) -> Path:
    """ROOT/train and ROOT/val with so many noisy images of each class; size is (height, width)."""
    draws = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for kind, name in enumerate(NAMES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = 128 + 60 * np.eye(3)[kind] + draws.normal(0, noise, (*size, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / part / name / f"{number}.png")
    return root
