"""CPU decoding against PIL: every kind of image, crops, validation resizing, bad files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from deepmim_scale.data import torch_backend
from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.choose_backend import choose_loader
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.data.sample_plan import crops, flips
from deepmim_scale.data.torch_backend import (
    ReadImage,
    center,
    cut,
    decode_image,
    decode_whole,
    image_reader,
    start,
    stream,
)
from deepmim_scale.errors import UserError
from deepmim_scale.image_format import ImageFormat

CPU = torch.device("cpu")
IMAGE = ImageFormat(3, 32, 32)


class Photos(NamedTuple):
    """Files with what to make of them."""

    paths: list[str]
    request: DecodeRequest


def reader(paths: list[str]) -> ReadImage:
    def read_image(sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        image = decode_image(Path(paths[sample_id]).read_bytes())
        return image if box is None else cut(image, box)

    return read_image


def request_for(paths: list[str], heights: np.ndarray, widths: np.ndarray) -> Photos:
    ids = np.arange(len(paths))
    boxes = crops(0, 0, ids, heights, widths, 0.2)
    return Photos(paths, DecodeRequest(ids, boxes, flips(0, 0, ids)))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colors with some detail, like a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 255, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + generator.integers(-12, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def pil_crop(path: str, box: list[int], flip: bool, size: int) -> np.ndarray:
    """What the official code does: convert, crop, bicubic resize, mirror; int [3, S, S]."""
    top, left, height, width = box
    image = Image.open(path).convert("RGB").crop((left, top, left + width, top + height))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.int64)
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """200 JPEGs of several sizes with their training crops, as one DecodeRequest."""
    root = tmp_path_factory.mktemp("photos")
    shapes = [(75, 100), (120, 90), (64, 64), (33, 140)]
    paths = [str(root / f"{i}.jpg") for i in range(200)]
    for i, path in enumerate(paths):
        picture(*shapes[i % 4], seed=i).save(path, quality=90)
    heights, widths = np.array([shapes[i % 4] for i in range(200)]).T
    return request_for(paths, heights, widths)


@pytest.fixture(scope="module")
def real(photographs: Path) -> Photos:
    """200 photographs with their training crops."""
    paths = sorted(str(path) for path in photographs.iterdir())
    widths, heights = np.array([Image.open(path).size for path in paths]).T
    return request_for(paths, heights, widths)


@pytest.mark.parametrize("size", [32, 112])
@pytest.mark.parametrize("kind", ["real", "photos"])
def test_pixels_are_pils(kind: str, size: int, request: pytest.FixtureRequest) -> None:
    paths, wanted = request.getfixturevalue(kind)
    ours = (
        start(wanted, reader(paths), ImageFormat(3, size, size), threads=2)()
        .numpy()
        .astype(np.int64)
    )
    rows = zip(paths, wanted.boxes.tolist(), wanted.flips.tolist(), strict=True)
    difference = np.abs(ours - np.stack([pil_crop(*row, size) for row in rows]))
    assert difference.mean() <= 0.05, difference.mean()
    assert difference.max() <= 4, difference.max()


def test_threads_and_prefetch_change_nothing(photos: Photos) -> None:
    read_image, whole_request = reader(photos.paths), photos.request

    def parts() -> Iterator[DecodeRequest]:
        for first in range(0, 200, 40):
            at = slice(first, first + 40)
            yield DecodeRequest(
                whole_request.ids[at], whole_request.boxes[at], whole_request.flips[at]
            )

    whole = start(whole_request, read_image, IMAGE, threads=1)()
    for threads, prefetch in [(1, 1), (2, 2), (3, 4)]:
        rows, images = zip(*stream(parts(), read_image, IMAGE, threads, prefetch), strict=True)
        assert torch.equal(torch.cat(images), whole), (threads, prefetch)
        np.testing.assert_array_equal(
            np.concatenate([part.ids for part in rows]), whole_request.ids
        )


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGB", "a.jpg", {"quality": 95}),
        ("RGB", "a.jpg", {"quality": 80, "progressive": True}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "a.png", {}),
        ("L", "a.png", {}),
        ("RGBA", "a.png", {}),
        ("P", "a.png", {}),
        ("1", "a.png", {}),
        ("RGB", "a.bmp", {}),
        ("RGB", "a.webp", {"lossless": True}),
        ("RGB", "a.tiff", {}),
    ],
)
def test_every_kind_reads_as_in_pil(
    tmp_path: Path, mode: str, name: str, options: dict[str, Any]
) -> None:
    path = tmp_path / name
    picture(40, 60).convert(mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB"), np.int64)
    found = decode_image(path.read_bytes())
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = decode_image((tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(found, np.repeat((values // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize("endian", ["<", ">"])
def test_exif_orientation_is_ignored(tmp_path: Path, endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = 6
    picture(20, 50).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image((tmp_path / "turned.jpg").read_bytes()).shape == (20, 50, 3)


def test_extension_may_lie(tmp_path: Path) -> None:
    picture(20, 50).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "really.jpg")
    assert decode_image((tmp_path / "really.jpg").read_bytes()).shape == (20, 50, 3)


@pytest.mark.parametrize(("height", "width"), [(75, 100), (300, 90), (36, 36), (10, 17), (32, 33)])
def test_held_out_images_follow_torchvision(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "a.png"
    picture(height, width).save(path)
    resize = Resize(36, InterpolationMode.BICUBIC)
    expected = np.asarray(CenterCrop(32)(resize(Image.open(path))), np.int64)
    found = decode_whole(np.array([0]), reader([str(path)]), IMAGE, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 2


def test_held_out_image_of_the_inputs_size_is_untouched() -> None:
    image = np.asarray(picture(32, 32))
    np.testing.assert_array_equal(center(image, (32, 32)), image)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (b"\xff\xd8" + bytes(range(256)), "."),
        ("half", "incomplete or truncated"),
        ("png", "truncated"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, data: bytes | str, reason: str) -> None:
    (tmp_path / "images").mkdir()
    good, path = tmp_path / "images" / "good.jpg", tmp_path / "images" / "bad.jpg"
    picture(60, 80).save(good)
    if data == "half":
        data = good.read_bytes()[:1500]
    elif data == "png":
        picture(60, 80).save(tmp_path / "c.png")
        data = (tmp_path / "c.png").read_bytes()[:3000]
    assert isinstance(data, bytes)
    path.write_bytes(data)
    source = open_folder(tmp_path / "images", on_bad="replace")
    rows = DecodeRequest(np.arange(2), np.array([[0, 0, 6, 8]] * 2), np.zeros(2, bool))
    with pytest.raises(BadImage, match=rf"bad\.jpg: .*{reason}") as error:
        start(rows, image_reader(source), ImageFormat(3, 16, 16), threads=2)()
    assert "\n" not in str(error.value)
    assert ".cpp" not in str(error.value)


def test_one_line_says_what_was_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_loader("auto", "auto", CPU)[0] == "torch"
    assert "loader torch (no GPU): JPEG by " in choose_loader("auto", "auto", CPU)[2]
    with pytest.raises(UserError, match="decode=mixed: needs --loader dali and a GPU"):
        choose_loader("torch", "mixed", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="loader=dali: NVIDIA DALI is not installed; pip install"):
        choose_loader("dali", "auto", CPU)


def test_pil_serves_where_nothing_else_is_installed(
    photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(photos.paths[0]).read_bytes()
    expected = decode_image(data)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    torch_backend.jpeg_decoder.cache_clear()
    try:
        assert torch_backend.jpeg_decoder()[0] == "PIL"
        assert np.abs(decode_image(data).astype(int) - expected).max() <= 1
    finally:
        torch_backend.jpeg_decoder.cache_clear()
