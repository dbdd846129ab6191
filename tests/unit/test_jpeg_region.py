"""Regions of JPEGs have the pixels of the whole image, and whatever is odd is decoded whole."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepmim_scale.data import jpeg_region
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.data.jpeg_region import decode_region
from deepmim_scale.data.sample_plan import crops
from deepmim_scale.data.torch_backend import cut, decode_fast, decode_image, image_reader, resize
from deepmim_scale.image_format import ImageFormat

needs_compiler = pytest.mark.skipif(
    not jpeg_region.is_available(), reason="no C compiler, or no headers of libjpeg-turbo"
)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colors with some detail, like a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 255, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + generator.integers(-12, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **options)
    return buffer.getvalue()


KINDS: list[dict[str, Any]] = [
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:2:0"},
    {"subsampling": "4:2:0", "progressive": True},
    {"subsampling": "4:2:0", "restart_marker_blocks": 3},
    {"subsampling": "4:4:4", "keep_rgb": True},
    {"mode": "L"},
    {"quality": 25, "subsampling": "4:2:0"},
]


@needs_compiler
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(97, 131), (64, 96), (17, 250), (1, 1), (9, 7)], ids=str)
def test_a_region_has_the_pixels_of_the_whole(kind: dict[str, Any], shape: tuple[int, int]) -> None:
    options = {name: value for name, value in kind.items() if name != "mode"}
    data = encode(picture(*shape).convert(kind.get("mode", "RGB")), **options)
    whole = decode_image(data)
    height, width = shape
    boxes = crops(0, 0, np.arange(40), np.full(40, height), np.full(40, width), 0.02)
    edges = [[0, 0, height, width], [height - 1, width - 1, 1, 1], [0, width - 1, height, 1]]
    for box in [*boxes.tolist(), *edges]:
        region = decode_region(data, shape, tuple(box))
        assert region is not None
        np.testing.assert_array_equal(region, cut(whole, np.array(box)), str(box))


@needs_compiler
def test_what_is_odd_is_left_to_the_decoder_of_whole_images() -> None:
    good = encode(picture(97, 131))
    box = (10, 20, 30, 40)
    assert decode_region(good, (97, 131), box) is not None
    assert decode_region(good + bytes(9), (97, 131), box) is not None, "zeros after its end"
    flipped = bytearray(good)
    for place in range(700, len(good) - 2, 50):
        flipped[place] ^= 0x55
    odd = {
        "cut": good[: len(good) // 2],
        "cut where the region is whole": good[:-40],
        "cut header": good[:100],
        "flipped": bytes(flipped),
        "empty": b"",
        "no JPEG": b"\x89PNG" + bytes(100),
        "CMYK": encode(picture(97, 131).convert("CMYK")),
    }
    for name, data in odd.items():
        assert decode_region(data, (97, 131), box) is None, name
    assert decode_region(good, (97, 130), box) is None, "the header was another one"
    assert decode_region(good, (97, 131), (90, 20, 30, 40)) is None, "outside"


@needs_compiler
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_fast_decoding_is_the_decoder_at_a_fraction(divisor: int) -> None:
    data = encode(picture(203, 301, seed=3))
    with Image.open(io.BytesIO(data)) as image:  # PIL decodes at a fraction in its draft mode
        image.draft("RGB", (301 // divisor, 203 // divisor))
        small = np.asarray(image)
    assert small.shape[0] == -(-203 // divisor)
    top, left, height, width = (40 // divisor, 64 // divisor, 80 // divisor, 120 // divisor)
    region = decode_region(data, (203, 301), (top, left, height, width), divisor)
    assert region is not None
    expected = small[top : top + height, left : left + width]
    np.testing.assert_array_equal(region, expected)


@needs_compiler
def test_the_difference_of_fast_is_bounded(photographs: Path) -> None:
    """Mean of 255, as docs/data.md promises it, for crops that are decoded at 1/2 to 1/8."""
    differences, fractions = [], 0
    for seed, path in enumerate(sorted(photographs.iterdir())[::20]):
        photo = Image.open(path).resize((640, 480), Image.Resampling.BICUBIC)
        data = encode(photo, quality=92)
        for box in crops(seed, 0, np.arange(6), np.full(6, 480), np.full(6, 640), 0.2):
            fast = decode_fast(data, (480, 640), box, (64, 64))
            if fast is not None:
                exact = resize(cut(decode_image(data), box), 64, 64)
                differences.append(np.abs(fast - exact.astype(np.int64)).mean())
                fractions += 1
            assert (fast is None) == (box[2:].min() < 128)
    print(f"mean difference {np.mean(differences):.3f}, at most {np.max(differences):.3f}")
    assert fractions > 50
    assert np.mean(differences) <= 0.55


@needs_compiler
def test_fast_is_exact_where_no_fraction_suffices(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepmim_scale.data.torch_backend.CACHE_BYTES", 0)
    source = open_folder(photographs)  # 96 px a side
    boxes = crops(0, 0, np.arange(40), *source.sizes[:40].T, 0.2)
    for i, box in enumerate(boxes):
        fast, exact = (
            image_reader(source, ImageFormat(3, 50, 50), fast=True)(i, box),
            image_reader(source)(i, box),
        )
        np.testing.assert_array_equal(fast, exact)


def test_readers_agree_with_and_without_the_compiled_file(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepmim_scale.data.torch_backend.CACHE_BYTES", 0)
    source = open_folder(photographs)
    heights, widths = source.sizes.T
    boxes = crops(0, 0, np.arange(len(source)), heights, widths, 0.2)
    one = [image_reader(source)(i, boxes[i]) for i in range(0, len(source), 5)]
    monkeypatch.setattr(jpeg_region, "_library", lambda: None)
    two = [image_reader(source)(i, boxes[i]) for i in range(0, len(source), 5)]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("compiler", ["absent-compiler", "false"])
def test_without_a_compiler_whole_images_are_decoded(tmp_path: Path, compiler: str) -> None:
    code = "from deepmim_scale.data import jpeg_region; print(jpeg_region.is_available())"
    environment = os.environ | {"CC": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert not list(tmp_path.rglob("*.so"))
