"""Decode, crop and resize on CPU threads: torchcodec or torchvision for JPEG, PIL for the rest.

The pixels are those of PIL's convert("RGB"), crop and bicubic resize, up to rounding.
Legend: B images, S side of the output.
"""

from __future__ import annotations

import functools
import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from deepmim_scale.data.backend import BadImage, DecodeRequest

EXIF_WITHIN = 4096  # bytes from the start of the file

Read = Callable[[str], np.ndarray]


@functools.cache
def jpeg_decoder() -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name and function (bytes -> uint8 [3, H, W]) of the best JPEG decoder that is installed."""
    try:
        from torchcodec.decoders import decode_jpeg

        return "torchcodec", lambda data: decode_jpeg(_without_exif(data), mode="RGB")
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


def center(image: np.ndarray, size: int) -> np.ndarray:
    """Validation images: short side to size * 256 / 224, then the central [S, S, 3].

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


def stream(
    jobs: Iterator[DecodeRequest],
    size: int,
    threads: int,
    read: Read = read_image,
    prefetch: int = 2,
) -> Iterator[tuple[DecodeRequest, torch.Tensor]]:
    """The backend: up to `prefetch` micro-batches are decoded at once, in order."""
    pending: deque[tuple[DecodeRequest, Callable[[], torch.Tensor]]] = deque()
    for rows in jobs:
        pending.append((rows, start(rows, size, threads, read)))
        if len(pending) == prefetch:
            first, wait = pending.popleft()
            yield first, wait()
    for rows, wait in pending:
        yield rows, wait()


def start(
    rows: DecodeRequest, size: int, threads: int, read: Read = read_image
) -> Callable[[], torch.Tensor]:
    """Start decoding one micro-batch; the function returned waits for it, uint8 [B, 3, S, S].

    The wait raises BadImage naming the first bad file.
    """

    def make(i: int) -> np.ndarray:
        return crop(read(rows.paths[i]), rows.boxes[i], rows.flips[i], size)

    return _start(make, len(rows.paths), size, threads)


def decode_whole(paths: list[str], size: int, threads: int, read: Read) -> torch.Tensor:
    """Validation images as `center` makes them, uint8 [B, 3, S, S]; raises BadImage."""
    return _start(lambda i: center(read(paths[i]), size), len(paths), size, threads)()


def _start(
    make: Callable[[int], np.ndarray], count: int, size: int, threads: int
) -> Callable[[], torch.Tensor]:
    images = np.empty((count, 3, size, size), np.uint8)

    def fill(places: np.ndarray) -> None:
        for i in places:
            images[i] = make(i).transpose(2, 0, 1)

    # A few tasks per thread balance sizes; one thread needs no balance.
    num_tasks = 1 if threads == 1 else 4 * threads
    tasks = [_pool(threads).submit(fill, part) for part in np.array_split(range(count), num_tasks)]

    def wait() -> torch.Tensor:
        for task in tasks:
            task.result()
        return torch.from_numpy(images)

    return wait


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _pil_rgb(data: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(data.tobytes())) as image:
        if image.mode.startswith("I"):  # 16 bits: PIL would clip at 255 instead of scaling
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _without_exif(data: torch.Tensor) -> torch.Tensor:
    """torchcodec turns images by their EXIF tag and cannot be told not to: clear its header."""
    place = data[:EXIF_WITHIN].numpy().tobytes().find(b"Exif\0\0")
    if place >= 0:
        data[place + 6 : place + 14] = 0  # byte order, magic number, offset
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError | ValueError):
        return "not an image"
    # Errors of the C++ decoders begin with the place in their source.
    return str(error).split("\n")[0].split(".cpp:")[-1].lstrip("0123456789, ")
