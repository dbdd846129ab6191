"""Images of other channels, bits and shapes than RGB squares: read, measured, refused, trained."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from deepmim_scale.cli import main as cli
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data.backend import BadImage, WrongPixels
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.data.header import image_size
from deepmim_scale.data.native_pixels import decode_native, native_size
from deepmim_scale.data.step_loader import iter_validation
from deepmim_scale.data.torch_backend import (
    center,
    decode_image,
    decode_plain,
    decode_stored,
    image_reader,
    resize,
)
from deepmim_scale.image_format import ImageFormat
from deepmim_scale.runs.folder import load_run_config, read_metrics

tifffile = pytest.importorskip("tifffile")
ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
TINY = [
    word
    for line in (
        "--img-size 16 --patch-size 4 --embed-dim 16 --depth 4 --taps even --num-heads 2",
        "--decoder-embed-dim 8 --decoder-depth 1 --decoder-num-heads 2",
        "--global-batch 4 --microbatch-size 4 --steps 2 --loader-threads 1",
    )
    for word in line.split()
]


def random_pixels(height: int, width: int, channels: int, dtype: type = np.uint16) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, (height, width, channels)).astype(dtype)


def pretrain(words: list[str]) -> None:
    """In a process of its own, which keeps its process group."""
    command = [sys.executable, "launcher/pretrain.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def failed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    if array.ndim == 3 and array.shape[2] > 1:
        options = {"planarconfig": "contig"} | options
    tifffile.imwrite(file, array, photometric="minisblack", **options)
    return file.getvalue()


def deep_png(array: np.ndarray) -> bytes:
    """A PNG of 16 bits and 1 to 4 channels, written by hand: PIL writes only gray."""
    import struct
    import zlib

    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_and_tiffs_come_back_as_they_are(channels: int, dtype: type) -> None:
    array = random_pixels(9, 14, channels, dtype)
    files = [npy(array), npy(array.astype(array.dtype.newbyteorder(">")))]
    files += [tiff(array), tiff(array, compression="zlib")]
    files.append(tiff(array, compression="zlib"))
    for data in files:
        found = decode_native(data)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)
        assert image_size(data[:3584], lambda data=data: data) == (9, 14)
    if channels == 1:
        np.testing.assert_array_equal(decode_native(npy(array[..., 0])), array)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_deep_png_keeps_its_bits(channels: int) -> None:
    array = random_pixels(7, 11, channels)
    np.testing.assert_array_equal(decode_native(deep_png(array)), array)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1)]
)
def test_pictures_have_their_own_channels(mode: str, channels: int) -> None:
    file = io.BytesIO()
    Image.fromarray(random_pixels(8, 6, 3, np.uint8)).convert(mode).save(file, "png")
    assert decode_native(file.getvalue()).shape == (8, 6, channels)


def header_of(shape: str, descr: str = "'|u1'", order: str = "False") -> bytes:
    """An .npy with any header and no pixels."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_untrusted_arrays_are_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickled = npy(np.array([Trap(trap)], dtype=object))
    for data, reason in [
        (pickled, "holds object"),
        (header_of("(1000000, 1000000, 16)"), "more than 256 MiB"),
        (header_of("(-3, 5)"), "more than 256 MiB"),
        (header_of("(0, 5)"), "more than 256 MiB"),
        (header_of("(5, 5, 17)"), "17 channels"),
        (header_of("(5,)"), "shape"),
        (header_of("(5, 5)", order="True"), "in rows"),
        (header_of("(5, 5)", descr="'<f4'"), "holds float32"),
        (header_of("(5, 5)"), "0 bytes of pixels"),
        (header_of("(5, 5)") + bytes(26), "26 bytes of pixels"),
        (header_of("__import__('os').getcwd()"), "malformed"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "version"),
        (b"\x93NUMPY", "magic string"),
        (b"II*\0" + bytes(50), "TIFF that cannot be read"),
        (tiff(random_pixels(9, 9, 5))[:-40], "failed to read 810 bytes"),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode_stored(data)
    assert not trap.exists()
    assert native_size(header_of("(1000000, 1000000, 16)")) is None
    assert pickle.dumps(Trap(trap)), "the trap itself works"


def test_rgb_runs_take_what_can_be_rgb() -> None:
    gray, deep = random_pixels(5, 6, 1), random_pixels(5, 6, 3)
    np.testing.assert_array_equal(decode_image(npy(deep)), deep >> 8)
    np.testing.assert_array_equal(decode_image(tiff(deep)), deep >> 8)
    np.testing.assert_array_equal(decode_image(npy(gray)), np.repeat(gray >> 8, 3, axis=2))
    with pytest.raises(WrongPixels, match="5 channels, which are no RGB"):
        decode_image(npy(random_pixels(5, 6, 5)))
    with pytest.raises(
        WrongPixels, match="has 3 channels of 16 bits, the run takes 5 channels of 16 bits"
    ):
        decode_plain(npy(deep), ImageFormat(5, 8, 8, 16))


@pytest.mark.parametrize("channels", [1, 5])
def test_deep_pixels_are_resized_as_torch_does_in_double(channels: int) -> None:
    array = random_pixels(40, 31, channels)
    found = resize(array, 12, 18)
    assert found.dtype == np.uint16
    wide = torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(wide, (12, 18), mode="bicubic", antialias=True)
    expected = expected[0].permute(1, 2, 0).round().clamp(0, 65535).numpy()
    assert np.abs(found - expected).max() <= 1


def test_the_center_of_a_size_that_is_no_square() -> None:
    image = np.asarray(Image.linear_gradient("L"))[..., None]  # 256 x 256, brighter downwards
    found = center(image, (224, 112))
    assert found.shape == (224, 112, 1)
    # Covered by 256 x 256, so nothing is resized, and the middle is cut out.
    np.testing.assert_array_equal(found, image[16:240, 72:184])


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and two validation images of five channels of 16 bits, .npy and TIFF."""
    root = tmp_path_factory.mktemp("five")
    for split, count in (("train", 12), ("val", 2)):
        for number in range(count):
            folder = root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            array = (random_pixels(20, 26, 5) // np.uint16([1, 2, 4, 8, 16])).astype(np.uint16)
            name = f"{number}.npy" if number % 2 else f"{number}.tif"
            (folder / name).write_bytes(npy(array) if number % 2 else tiff(array))
    return root


def test_statistics_are_those_of_the_pixels(five: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(["data", "stats", str(five)])
    out = capsys.readouterr().out
    assert "5 channels of 16 bits in 12 images" in out
    found = json.loads((five / "train" / "stats.json").read_text())
    source = open_folder(five / "train")
    pixels = np.stack([decode_native(source.read(i)) for i in range(12)]) / 65535
    np.testing.assert_allclose(found["mean"], pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["std"], pixels.std((0, 1, 2)), rtol=1e-5)


def test_a_run_of_five_channels_and_another_height(
    five: Path,
    tmp_path: Path,
    error_of: Callable[[list[str]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli(["data", "stats", str(five)])
    output = tmp_path / "run"
    words = ["--preset", "debug", "--data", str(five), *TINY, "--output", str(output)]
    assert "in_chans=3" in error_of(words)
    assert "have 5 channels; use --in-chans 5" in error_of([*words, "--in-chans", "4"])
    words += ["--in-chans", "5"]
    assert "loader=dali" in error_of([*words, "--loader", "dali"])
    words += ["--img-size", "24", "16"]
    pretrain(words)
    model = load_run_config(str(output)).model
    stats = json.loads((five / "train" / "stats.json").read_text())
    assert (model.pixel_bits, list(model.pixel_mean)) == (16, stats["mean"])
    assert (model.image_format.size, model.grid, model.num_patches) == ((24, 16), (6, 4), 24)
    rows = read_metrics(output)
    assert len(rows) >= 2
    (batch,) = iter_validation(load_run_config(str(output)), open_folder(five / "val"))
    assert batch.images.dtype == torch.uint16
    assert batch.images.shape == (2, 5, 24, 16)
    cli(["analyze", "reconstruct", str(output), "--output", str(tmp_path / "picture.png")])
    cli(["analyze", "attention", str(output), "--images", "2", "--output", str(tmp_path / "a.png")])
    timm_file, hf_file = tmp_path / "timm.safetensors", tmp_path / "model.safetensors"
    cli(["export", str(output), "--output", str(timm_file)])
    command = capsys.readouterr().out.split("load it with ")[1]
    network = eval(command, {"timm": timm})
    assert network.patch_embed.grid_size == (6, 4)
    assert "img_size=24 16; use timm" in failed(
        ["export", str(output), "--format", "hf", "--output", str(hf_file)], capsys
    )
    tuned = ["finetune", str(timm_file), "--data", str(five), "--output", str(tmp_path / "ft")]
    assert "img_size=24 16: fine-tuning takes square" in failed(tuned, capsys)
    # Another grid of another shape: the table is resized from its own.
    wider = [*words[:-2], "24", "32", "--init-from", str(output), "--output", str(tmp_path / "b")]
    pretrain(wider)
    # Going on compares what the data gave, too.
    pretrain([*words, "--steps", "2"])


def test_what_has_no_statistics_is_one_line(
    data: Path, error_of: Callable[[list[str]], str], tmp_path: Path
) -> None:
    words = ["--preset", "debug", "--data", str(data), *TINY, "--output", str(tmp_path / "run")]
    line = error_of([*words, "--in-chans", "5"])
    assert line.startswith("error: in_chans=5: ")
    assert "run `deepmim-scale data stats" in line
    given = ["--in-chans", "2", "--pixel-mean", "0.5", "0.5", "--pixel-std", "0.2", "0.2"]
    assert "has 3 channels of 8 bits, the run takes 2" in error_of([*words, *given])
    assert "pixel_std=0.2" in error_of(
        [*words, "--pixel-mean", "0", "0", "0", "--pixel-std", "0.2"]
    )
    assert "must be a whole number" in error_of([*words, "--img-size", "x"])
    assert "img_size=18" in error_of([*words, "--img-size", "16", "18"])


def test_mixed_pictures_count_as_rgb_and_mixed_bits_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, mode in enumerate(["L", "RGB", "RGBA", "RGB"]):
        image = Image.fromarray(random_pixels(9, 8, 3, np.uint8)).convert(mode)
        image.save(tmp_path / f"{number}.png")
    cli(["data", "stats", str(tmp_path)])
    assert "3 channels of 8 bits in 4 images" in capsys.readouterr().out
    (tmp_path / "deep.npy").write_bytes(npy(random_pixels(9, 8, 5)))
    assert "channels differ" in failed(["data", "stats", str(tmp_path)], capsys)


def test_readers_of_a_format(five: Path) -> None:
    source = open_folder(five / "train")
    read = image_reader(source, ImageFormat(5, 8, 8, 16))
    box = np.array([3, 5, 10, 12], np.int32)
    np.testing.assert_array_equal(read(1, box), decode_native(source.read(1))[3:13, 5:17])
    config = RunConfig(model=ModelConfig(img_size=16, patch_size=4, in_chans=5), microbatch_size=2)
    with pytest.raises(WrongPixels, match="16 bits"):
        next(iter_validation(config, source))
