"""Small real data from installed packages: free photographs of scikit-image, scikit-learn's digits.

Regions of a photograph are a quarter of its height, at least 96 px, stored at 96 px: a random crop
brought to the quickstart's 32 px then shows edges and parts of objects, and the right quarter of
every photograph, which is validation and never cropped for training, is wide enough for them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deepmim_scale.arguments import writable
from deepmim_scale.data.philox import SAMPLES, philox, scale_to
from deepmim_scale.data.source import Split
from deepmim_scale.errors import UserError

# Licence and origin as skimage.data documents them; all are free to use, change and pass on.
PHOTOS = {
    "astronaut": "public domain; NASA Great Images, Eileen Collins (https://flic.kr/p/r9qvLn)",
    "brick": "CC0; CC0Textures (https://cc0textures.com/view.php?tex=Bricks25)",
    "camera": "CC0; Lav Varshney",
    "chelsea": "CC0; Stefan van der Walt, Chelsea the cat",
    "coffee": "CC0; Rachel Michetti, courtesy of Pikolo Espresso Bar",
    "grass": "CC0; linolafett (https://www.deviantart.com/linolafett/art/Grass-01-434853879)",
    "gravel": "CC0; CC0Textures (https://cc0textures.com/view.php?tex=Gravel04)",
    "hubble_deep_field": "public domain; NASA, Hubble eXtreme Deep Field (hubblesite.org, 2012/37)",
    "retina": "CC0; Mikael Haggstrom, doi:10.15347/wjm/2014.008 (Wikimedia Commons)",
    "rocket": "public domain; SpaceX Photos, DSCOVR on Falcon 9 (Flickr 16511594820)",
}
DIGITS_ORIGIN = "CC BY 4.0; E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI)"
REGION_SIDE = 96
TRAIN_REGIONS, VAL_REGIONS = 80, 8  # of each photograph
DIGIT_SIDE = 32


def write_samples(out: str | Path) -> bool:
    """Write OUT/train/<class> and OUT/val/<class>; False if the sample set is there already.

    The folder appears complete or not at all. Raises UserError if OUT holds something else.
    """
    out = Path(out)
    if (out / "ATTRIBUTION.txt").exists():
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: holds other files; name a new or empty folder")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    writable("out", temporary)
    for number, name in enumerate(PHOTOS):
        _write_photo(temporary, number, name)
    images, _ = _digits()
    for split, first in (("train", 0), ("val", 1)):
        folder = temporary / split / "digits"
        folder.mkdir(parents=True)
        for i in range(first, len(images), 2):
            Image.fromarray(images[i]).save(folder / f"{i:04}.png")
    lines = [f"{name}: {origin}" for name, origin in (PHOTOS | {"digits": DIGITS_ORIGIN}).items()]
    text = "\n".join(
        ["Parts of these images, as shipped by scikit-image and scikit-learn:", *lines]
    )
    (temporary / "ATTRIBUTION.txt").write_text(text + "\n", encoding="utf-8")
    temporary.rename(out)
    return True


def load_digits_probe() -> tuple[np.ndarray, np.ndarray]:
    """The validation digits with their labels: images uint8 [n, 3, 32, 32], labels int64 [n]."""
    digits = labelled_digits("val")
    return np.repeat(digits.images[:, None], 3, axis=1), digits.labels


@dataclass(frozen=True)
class LabelledDigits:
    """The digits of one part of the sample set, with the labels that it leaves out."""

    images: np.ndarray
    """uint8 [n, 32, 32]."""
    labels: np.ndarray
    """int64 [n]."""

    def write(self, folder: Path, ids: np.ndarray) -> None:
        """Write the digits `ids` as folder/<label>/<id>.png; what is there stays."""
        for i in ids.tolist():
            path = folder / str(self.labels[i]) / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(self.images[i]).save(path)


def labelled_digits(split: Split) -> LabelledDigits:
    """The digits that the sample set's `train` or `val` holds."""
    images, labels = _digits()
    first = 0 if split == "train" else 1
    return LabelledDigits(images[first::2], labels[first::2])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits, 8x8 enlarged smoothly: uint8 [1797, 32, 32], int64 [1797]; odd: validation."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    side = (DIGIT_SIDE, DIGIT_SIDE)
    large = [np.asarray(Image.fromarray(x).resize(side, Image.Resampling.BICUBIC)) for x in small]
    return np.stack(large), labels.astype(np.int64)


def _write_photo(root: Path, number: int, name: str) -> None:
    import skimage.data

    photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    side = max(REGION_SIDE, photo.height // 4)
    border = photo.width * 3 // 4
    for split, count, first, end in (
        ("train", TRAIN_REGIONS, 0, border),
        ("val", VAL_REGIONS, border, photo.width),
    ):
        folder = root / split / name
        folder.mkdir(parents=True)
        rows, columns, _, _ = philox(number, np.arange(count), 0, first > 0, SAMPLES)
        tops = scale_to(rows, np.full(count, photo.height - side + 1))
        lefts = first + scale_to(columns, np.full(count, end - first - side + 1))
        for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
            region = photo.crop((left, top, left + side, top + side))
            region = region.resize((REGION_SIDE, REGION_SIDE), Image.Resampling.BICUBIC)
            region.save(folder / f"{i:02}.jpg", quality=92)
