"""Decode, crop and resize on CPU threads: torchcodec or torchvision for JPEG, PIL for the rest.

The pixels are those of PIL's convert("RGB"), crop and bicubic resize, up to rounding.
Legend: B images, S side of the output.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

Read = Callable[[str], np.ndarray]


class BadImage(ValueError):
    """A file that cannot be decoded; the message names it."""


@functools.cache
def jpeg_decoder() -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name and function (bytes -> uint8 [3, H, W]) of the best JPEG decoder that is installed."""
    try:
        from torchcodec.decoders import decode_jpeg

        return "torchcodec", functools.partial(decode_jpeg, mode="RGB")
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        return "torchvision", functools.partial(decode_jpeg, mode=ImageReadMode.RGB)
    except ImportError:
        return "PIL", lambda data: torch.from_numpy(_pil_rgb(data.numpy())).permute(2, 0, 1)


def read_image(path: str) -> np.ndarray:
    """Decode a file to RGB, uint8 [H, W, 3], without EXIF rotation; raises BadImage."""
    try:
        data = np.fromfile(path, np.uint8)
        if data[:2].tobytes() == b"\xff\xd8":
            return jpeg_decoder()[1](torch.from_numpy(data)).permute(1, 2, 0).numpy()
        return _pil_rgb(data)
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: {_reason(error)}") from error


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, uint8 [H, W, 3] -> [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0).numpy()


def crop(image: np.ndarray, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """Cut box (top, left, height, width), resize to [S, S, 3], mirror if `flip`."""
    top, left, height, width = box.tolist()
    out = resize(image[top : top + height, left : left + width], size, size)
    return out[:, ::-1] if flip else out


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """Held-out images: short side to size * 256 / 224, then the central [S, S, 3].

    An image of exactly the input's size stays as it is.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    short = size * 256 // 224
    scale = short / min(height, width)
    tall, wide = (max(short, int(side * scale)) for side in (height, width))
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return resize(image, tall, wide)[top : top + size, left : left + size]


def decode(
    paths: Sequence[str],
    boxes: np.ndarray,
    flips: np.ndarray,
    size: int,
    threads: int,
    read: Read = read_image,
) -> torch.Tensor:
    """Images cut by boxes [B, 4] and mirrored by flips [B], uint8 [B, 3, S, S].

    Raises BadImage naming the first file that cannot be decoded.
    """
    return batch(
        threads,
        size,
        lambda path, box, flip: crop(read(path), box, flip, size),
        paths,
        boxes,
        flips,
    )


def batch(
    threads: int, size: int, make: Callable[..., np.ndarray], *columns: Iterable
) -> torch.Tensor:
    """Call `make` (-> [S, S, 3]) for each row of the columns on threads; uint8 [B, 3, S, S]."""
    rows = list(zip(*columns, strict=True))
    images = np.empty((len(rows), 3, size, size), np.uint8)

    def fill(index: int) -> None:
        images[index] = make(*rows[index]).transpose(2, 0, 1)

    # list() waits for all and raises the first error in order of the rows.
    list(
        map(fill, range(len(rows))) if threads == 1 else _pool(threads).map(fill, range(len(rows)))
    )
    return torch.from_numpy(images)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _pil_rgb(data: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(data.tobytes())) as image:
        if image.mode.startswith("I"):  # 16 bits: PIL would clip at 255 instead of scaling
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError | ValueError):
        return "not an image"
    # Errors of the C++ decoders begin with the place in their source.
    return str(error).split("\n")[0].split(".cpp:")[-1].lstrip("0123456789, ")
