"""CPU decoding against PIL: every kind of image, crops, validation resizing, bad files."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from deepmim_scale.data import torch_backend
from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.backends import choose_loader
from deepmim_scale.data.sample_plan import crops, flips
from deepmim_scale.data.torch_backend import center, decode_whole, read_image, start, stream
from deepmim_scale.errors import UserError

CPU = torch.device("cpu")


def picture(height, width, seed=0):
    """Smooth colors with some detail, like a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 255, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + generator.integers(-12, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def pil_crop(path, box, flip, size):
    """What the official code does: convert, crop, bicubic resize, mirror; int [3, S, S]."""
    top, left, height, width = box
    image = Image.open(path).convert("RGB").crop((left, top, left + width, top + height))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.int64)
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """200 JPEGs of several sizes with their training crops, as one DecodeRequest."""
    root = tmp_path_factory.mktemp("photos")
    shapes = [(75, 100), (120, 90), (64, 64), (33, 140)]
    ids = np.arange(200)
    paths = [str(root / f"{i}.jpg") for i in ids]
    for i, path in enumerate(paths):
        picture(*shapes[i % 4], seed=i).save(path, quality=90)
    heights, widths = np.array([shapes[i % 4] for i in ids]).T
    return DecodeRequest(ids, paths, crops(0, 0, ids, heights, widths, 0.2), flips(0, 0, ids))


@pytest.fixture(scope="module")
def real(photographs):
    """200 photographs with their training crops."""
    paths = sorted(str(path) for path in photographs.iterdir())
    ids = np.arange(len(paths))
    widths, heights = np.array([Image.open(path).size for path in paths]).T
    return DecodeRequest(ids, paths, crops(0, 0, ids, heights, widths, 0.2), flips(0, 0, ids))


@pytest.mark.parametrize("size", [32, 112])
@pytest.mark.parametrize("kind", ["real", "photos"])
def test_pixels_are_pils(kind, size, request):
    rows_of = request.getfixturevalue(kind)
    ours = start(rows_of, size, threads=2)().numpy().astype(np.int64)
    rows = zip(rows_of.paths, rows_of.boxes, rows_of.flips, strict=True)
    difference = np.abs(ours - np.stack([pil_crop(*row, size) for row in rows]))
    assert difference.mean() <= 0.05, difference.mean()
    assert difference.max() <= 4, difference.max()


def test_threads_and_prefetch_change_nothing(photos):
    def parts():
        for first in range(0, 200, 40):
            at = slice(first, first + 40)
            yield DecodeRequest(
                photos.ids[at], photos.paths[at], photos.boxes[at], photos.flips[at]
            )

    whole = start(photos, 32, threads=1)()
    for threads, prefetch in [(1, 1), (2, 2), (3, 4)]:
        rows, images = zip(*stream(parts(), 32, threads, prefetch=prefetch), strict=True)
        assert torch.equal(torch.cat(images), whole), (threads, prefetch)
        np.testing.assert_array_equal(np.concatenate([part.ids for part in rows]), photos.ids)


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
def test_every_kind_reads_as_in_pil(tmp_path, mode, name, options):
    path = tmp_path / name
    picture(40, 60).convert(mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB"), np.int64)
    found = read_image(str(path))
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read_image(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(found, np.repeat((values // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize("endian", ["<", ">"])
def test_exif_orientation_is_ignored(tmp_path, endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = 6
    picture(20, 50).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).shape == (20, 50, 3)


def test_extension_may_lie(tmp_path):
    picture(20, 50).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "really.jpg")
    assert read_image(str(tmp_path / "really.jpg")).shape == (20, 50, 3)


@pytest.mark.parametrize(("height", "width"), [(75, 100), (300, 90), (36, 36), (10, 17), (32, 33)])
def test_held_out_images_follow_torchvision(tmp_path, height, width):
    path = tmp_path / "a.png"
    picture(height, width).save(path)
    resize = Resize(36, InterpolationMode.BICUBIC)
    expected = np.asarray(CenterCrop(32)(resize(Image.open(path))), np.int64)
    found = decode_whole([str(path)], 32, 1, read_image)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 2


def test_held_out_image_of_the_inputs_size_is_untouched():
    image = np.asarray(picture(32, 32))
    np.testing.assert_array_equal(center(image, 32), image)


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
def test_bad_files_are_named(tmp_path, data, reason):
    good, path = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    picture(60, 80).save(good)
    if data == "half":
        data = good.read_bytes()[:1500]
    elif data == "png":
        picture(60, 80).save(tmp_path / "c.png")
        data = (tmp_path / "c.png").read_bytes()[:3000]
    path.write_bytes(data)
    rows = DecodeRequest(
        np.arange(2), [str(good), str(path)], np.array([[0, 0, 6, 8]] * 2), np.zeros(2)
    )
    with pytest.raises(BadImage, match=rf"bad\.jpg: .*{reason}") as error:
        start(rows, 16, threads=2)()
    assert "\n" not in str(error.value)
    assert ".cpp" not in str(error.value)


def test_one_line_says_what_was_chosen_and_why(monkeypatch):
    assert choose_loader("auto", "auto", CPU)[0] == "torch"
    assert "loader torch (no GPU): JPEG by " in choose_loader("auto", "auto", CPU)[2]
    with pytest.raises(UserError, match="decode=mixed: needs --loader dali and a GPU"):
        choose_loader("torch", "mixed", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="loader=dali: NVIDIA DALI is not installed; pip install"):
        choose_loader("dali", "auto", CPU)


def test_pil_serves_where_nothing_else_is_installed(photos, monkeypatch):
    expected = read_image(photos.paths[0])
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    torch_backend.jpeg_decoder.cache_clear()
    try:
        assert torch_backend.jpeg_decoder()[0] == "PIL"
        assert np.abs(read_image(photos.paths[0]).astype(int) - expected).max() <= 1
    finally:
        torch_backend.jpeg_decoder.cache_clear()
