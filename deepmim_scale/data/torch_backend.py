"""Decode, crop and resize on CPU threads, the part of a JPEG that is needed and no more.

libjpeg-turbo decodes regions where it could be compiled (jpeg_region); torchcodec or torchvision
decode whole JPEGs, PIL the rest. The pixels are those of PIL's convert("RGB"), crop and bicubic
resize, up to rounding.
Legend: B images, S side of the output.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.jpeg_region import decode_region
from deepmim_scale.data.source import Source

EXIF_WITHIN = 4096  # bytes from the start of the file

CACHE_BYTES = 256 * 1024**2  # decoded images of a set up to this size stay in memory

DIVISORS = (8, 4, 2)  # of a JPEG's size, in which it can be decoded


class ReadImage(Protocol):
    """Reads and decodes samples; called on the decoding threads. Raises BadImage by name."""

    def __call__(self, sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        """RGB, uint8 [H, W, 3]: the image or the pixels of its box (top, left, height, width).

        A reader for `fast` decoding may give a box that is resized to [S, S, 3] already.
        """


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
        return "PIL", lambda data: torch.from_numpy(_pil_rgb(data.numpy().tobytes())).permute(
            2, 0, 1
        )


def decode_image(data: bytes) -> np.ndarray:
    """Decode to RGB, uint8 [H, W, 3], without EXIF rotation; raises BadImage with the reason."""
    try:
        if data[:2] == b"\xff\xd8":
            # The decoders take a tensor that may be written; bytes may not.
            pixels = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            return jpeg_decoder()[1](pixels).permute(1, 2, 0).numpy()
        return _pil_rgb(data)
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(_reason(error)) from error


def image_reader(source: Source, fast_size: int = 0) -> ReadImage:
    """Reads and decodes samples of `source`; images of a small set stay in memory.

    With `fast_size` = S, JPEGs are decoded at 1/2, 1/4 or 1/8 where a box keeps S pixels a side,
    and only otherwise with all their pixels.
    """
    sizes = source.sizes

    def read_whole(sample_id: int) -> np.ndarray:
        with _named(source, sample_id):
            return decode_image(source.read(sample_id))

    def read_image(sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        if box is None:
            return read_whole(sample_id)
        with _named(source, sample_id):
            data = source.read(sample_id)
            full_size = tuple(sizes[sample_id].tolist())
            pixels = decode_fast(data, full_size, box, fast_size) if fast_size else None
            if pixels is None:
                pixels = decode_region(data, full_size, tuple(box.tolist()))
            return cut(decode_image(data), box) if pixels is None else pixels

    num_pixels = int(sizes.astype(np.int64).prod(axis=1).sum())
    if 3 * num_pixels > CACHE_BYTES or fast_size:
        return read_image
    read_cached = functools.cache(read_whole)

    def read_from_memory(sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        image = read_cached(sample_id)
        return image if box is None else cut(image, box)

    return read_from_memory


@contextlib.contextmanager
def _named(source: Source, sample_id: int) -> Iterator[None]:
    """Errors of reading and decoding say which sample it was."""
    try:
        yield
    except OSError as error:
        raise BadImage(f"{source.name(sample_id)}: {error.strerror or error}") from error
    except BadImage as error:
        raise BadImage(f"{source.name(sample_id)}: {error}") from error


def decode_fast(
    data: bytes, full_size: tuple[int, int], box: np.ndarray, size: int
) -> np.ndarray | None:
    """The box of a JPEG, decoded at a fraction and resized by PIL to [S, S, 3].

    PIL takes boxes that lie between the pixels of the small image. None if there is no fraction
    that leaves S pixels a side, or another decoder must take the image.
    """
    top, left, height, width = box.tolist()
    divisor = next((d for d in DIVISORS if min(height, width) >= d * size), 1)
    if divisor == 1:
        return None
    first_row, first_column = top // divisor, left // divisor
    rows = -(-(top + height) // divisor) - first_row
    columns = -(-(left + width) // divisor) - first_column
    region = decode_region(data, full_size, (first_row, first_column, rows, columns), divisor)
    if region is None:
        return None
    corner = (left / divisor - first_column, top / divisor - first_row)
    within = (*corner, corner[0] + width / divisor, corner[1] + height / divisor)
    image = Image.fromarray(region).resize((size, size), Image.Resampling.BICUBIC, within)
    return np.asarray(image)


def cut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The box (top, left, height, width) of an image [H, W, 3]."""
    top, left, height, width = box.tolist()
    return image[top : top + height, left : left + width]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, uint8 [H, W, 3] -> [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0).numpy()


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
    requests: Iterator[DecodeRequest],
    read_image: ReadImage,
    size: int,
    threads: int,
    prefetch: int = 2,
) -> Iterator[tuple[DecodeRequest, torch.Tensor]]:
    """The backend: up to `prefetch` micro-batches are decoded at once, in order."""
    pending: deque[tuple[DecodeRequest, Callable[[], torch.Tensor]]] = deque()
    for request in requests:
        pending.append((request, start(request, read_image, size, threads)))
        if len(pending) == prefetch:
            first, wait = pending.popleft()
            yield first, wait()
    for request, wait in pending:
        yield request, wait()


def start(
    request: DecodeRequest, read_image: ReadImage, size: int, threads: int
) -> Callable[[], torch.Tensor]:
    """Start decoding one micro-batch; the function returned waits for it, uint8 [B, 3, S, S].

    The wait raises BadImage naming the first bad file.
    """

    def make(i: int) -> np.ndarray:
        out = resize(read_image(int(request.ids[i]), request.boxes[i]), size, size)
        return out[:, ::-1] if request.flips[i] else out

    return _start(make, len(request.ids), size, threads)


def decode_whole(ids: np.ndarray, read_image: ReadImage, size: int, threads: int) -> torch.Tensor:
    """Validation images as `center` makes them, uint8 [B, 3, S, S]; raises BadImage."""
    return _start(lambda i: center(read_image(int(ids[i])), size), len(ids), size, threads)()


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


def _pil_rgb(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
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
