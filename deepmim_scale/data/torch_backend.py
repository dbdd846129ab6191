"""Decode, crop and resize on CPU threads, the part of a JPEG that is needed and no more.

libjpeg-turbo decodes regions where it could be compiled (jpeg_region); torchcodec or torchvision
decode whole JPEGs, PIL the rest. The pixels are those of PIL's convert("RGB"), crop and bicubic
resize, up to rounding.
Legend: B images, C channels, H x W the output.
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

from deepmim_scale.data.backend import BadImage, DecodeRequest, WrongPixels, pixel_dtype
from deepmim_scale.data.jpeg_region import decode_region
from deepmim_scale.data.native_pixels import decode_native, is_npy, is_tiff
from deepmim_scale.data.source import Source
from deepmim_scale.image_format import RGB, ImageFormat

EXIF_WITHIN = 4096  # bytes from the start of the file

CACHE_BYTES = 256 * 1024**2  # decoded images of a set up to this size stay in memory

DIVISORS = (8, 4, 2)  # of a JPEG's size, in which it can be decoded


class ReadImage(Protocol):
    """Reads and decodes samples; called on the decoding threads. Raises BadImage by name."""

    def __call__(self, sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        """[height, width, C] of the run's format: the image, or its box (top, left, height, width).

        A reader for `fast` decoding may give a box that is resized to [H, W, 3] already.
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
        return _stored_rgb(data) if is_npy(data) else _pil_rgb(data)
    except BadImage:
        raise
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(_reason(error)) from error


def decode_stored(data: bytes) -> np.ndarray:
    """Decode as stored, uint8 or uint16 [height, width, channels]; raises BadImage."""
    try:
        return decode_native(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(_reason(error)) from error


def decode_plain(data: bytes, image: ImageFormat) -> np.ndarray:
    """As stored; raises WrongPixels where that is not the run's format."""
    pixels = decode_stored(data)
    channels, bits = pixels.shape[2], 8 * pixels.itemsize
    if (channels, bits) != (image.channels, image.bits):
        raise WrongPixels(f"has {channels} channels of {bits} bits, the run takes {image.kind}")
    return pixels


def image_reader(source: Source, image: ImageFormat = RGB, fast: bool = False) -> ReadImage:
    """Reads and decodes samples of `source`; images of a small set stay in memory.

    With `fast`, JPEGs are decoded at 1/2, 1/4 or 1/8 where a box keeps H x W pixels, and only
    otherwise with all their pixels.
    """
    sizes = source.sizes
    decode = decode_image if image.is_rgb else functools.partial(decode_plain, image=image)

    def read_whole(sample_id: int) -> np.ndarray:
        with _named(source, sample_id):
            return decode(source.read(sample_id))

    def read_image(sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        if box is None or not image.is_rgb:
            pixels = read_whole(sample_id)
            return pixels if box is None else cut(pixels, box)
        with _named(source, sample_id):
            data = source.read(sample_id)
            full_size = tuple(sizes[sample_id].tolist())
            region = decode_fast(data, full_size, box, image.size) if fast else None
            if region is None:
                region = decode_region(data, full_size, tuple(box.tolist()))
            return cut(decode_image(data), box) if region is None else region

    num_pixels = int(sizes.astype(np.int64).prod(axis=1).sum())
    if image.channels * image.bits // 8 * num_pixels > CACHE_BYTES or fast:
        return read_image
    read_cached = functools.cache(read_whole)

    def read_from_memory(sample_id: int, box: np.ndarray | None = None) -> np.ndarray:
        pixels = read_cached(sample_id)
        return pixels if box is None else cut(pixels, box)

    return read_from_memory


@contextlib.contextmanager
def _named(source: Source, sample_id: int) -> Iterator[None]:
    """Errors of reading and decoding say which sample it was."""
    try:
        yield
    except OSError as error:
        raise BadImage(f"{source.name(sample_id)}: {error.strerror or error}") from error
    except BadImage as error:
        raise type(error)(f"{source.name(sample_id)}: {error}") from error


def decode_fast(
    data: bytes, full_size: tuple[int, int], box: np.ndarray, size: tuple[int, int]
) -> np.ndarray | None:
    """The box of a JPEG, decoded at a fraction and resized by PIL to [*size, 3].

    PIL takes boxes that lie between the pixels of the small image. None if there is no fraction
    that leaves so many pixels, or another decoder must take the image.
    """
    top, left, height, width = box.tolist()
    out_height, out_width = size
    fits = (d for d in DIVISORS if height >= d * out_height and width >= d * out_width)
    divisor = next(fits, 1)
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
    image = Image.fromarray(region).resize(
        (out_width, out_height), Image.Resampling.BICUBIC, within
    )
    return np.asarray(image)


def cut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The box (top, left, height, width) of an image [height, width, C]."""
    top, left, height, width = box.tolist()
    return image[top : top + height, left : left + width]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, uint8 or uint16 [H, W, C] -> [height, width, C]."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    is_deep = image.dtype == np.uint16
    pixels = pixels.float() if is_deep else pixels
    out = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    out = out[0].permute(1, 2, 0)
    if not is_deep:
        return out.numpy()
    return out.round_().clamp_(0, np.iinfo(np.uint16).max).numpy().astype(np.uint16)


def center(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Validation images: made to cover 256 / 224 of the size, then its center, [*size, C].

    An image of exactly the input's size stays as it is.
    """
    if image.shape[:2] == size:
        return image
    covered = [side * 256 // 224 for side in size]
    scale = max(c / side for c, side in zip(covered, image.shape[:2], strict=True))
    tall, wide = (max(c, int(s * scale)) for c, s in zip(covered, image.shape[:2], strict=True))
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    return resize(image, tall, wide)[top : top + size[0], left : left + size[1]]


def stream(
    requests: Iterator[DecodeRequest],
    read_image: ReadImage,
    image: ImageFormat,
    threads: int,
    prefetch: int = 2,
    pinned: bool = False,
) -> Iterator[tuple[DecodeRequest, torch.Tensor]]:
    """The backend: up to `prefetch` micro-batches are decoded at once, in order.

    `pinned` memory is what a GPU copies from without the CPU.
    """
    pending: deque[tuple[DecodeRequest, Callable[[], torch.Tensor]]] = deque()
    for request in requests:
        pending.append((request, start(request, read_image, image, threads, pinned)))
        if len(pending) == prefetch:
            first, wait = pending.popleft()
            yield first, wait()
    for request, wait in pending:
        yield request, wait()


def start(
    request: DecodeRequest,
    read_image: ReadImage,
    image: ImageFormat,
    threads: int,
    pinned: bool = False,
) -> Callable[[], torch.Tensor]:
    """Start decoding one micro-batch; the function returned waits for it, [B, C, H, W].

    The wait raises BadImage naming the first bad file.
    """

    def make(i: int) -> np.ndarray:
        out = resize(read_image(int(request.ids[i]), request.boxes[i]), *image.size)
        return out[:, ::-1] if request.flips[i] else out

    return _start(make, len(request.ids), image, threads, pinned)


def decode_whole(
    ids: np.ndarray, read_image: ReadImage, image: ImageFormat, threads: int
) -> torch.Tensor:
    """Validation images as `center` makes them, [B, C, H, W]; raises BadImage."""
    return _start(lambda i: center(read_image(int(ids[i])), image.size), len(ids), image, threads)()


def _start(
    make: Callable[[int], np.ndarray],
    count: int,
    image: ImageFormat,
    threads: int,
    pinned: bool = False,
) -> Callable[[], torch.Tensor]:
    shape = (count, image.channels, *image.size)
    batch = torch.empty(shape, dtype=pixel_dtype(image), pin_memory=pinned)
    images = batch.numpy()

    def fill(places: np.ndarray) -> None:
        for i in places:
            images[i] = make(i).transpose(2, 0, 1)

    # A few tasks per thread balance sizes; one thread needs no balance.
    num_tasks = 1 if threads == 1 else 4 * threads
    tasks = [_pool(threads).submit(fill, part) for part in np.array_split(range(count), num_tasks)]

    def wait() -> torch.Tensor:
        for task in tasks:
            task.result()
        return batch

    return wait


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _pil_rgb(data: bytes) -> np.ndarray:
    try:
        image_file = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if is_tiff(data):  # of channels or bits that PIL does not know
            return _stored_rgb(data)
        raise
    with image_file as image:
        if image.mode.startswith("I"):  # 16 bits: PIL would clip at 255 instead of scaling
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _stored_rgb(data: bytes) -> np.ndarray:
    """What PIL does not know, [H, W, 1 or 3] of any bits, as RGB by the upper 8."""
    pixels = decode_native(data)
    if pixels.shape[2] not in (1, 3):
        raise WrongPixels(f"has {pixels.shape[2]} channels, which are no RGB")
    shallow = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    return np.broadcast_to(shallow, (*shallow.shape[:2], 3))


def _without_exif(data: torch.Tensor) -> torch.Tensor:
    """torchcodec turns images by their EXIF tag and cannot be told not to: clear its header."""
    place = data[:EXIF_WITHIN].numpy().tobytes().find(b"Exif\0\0")
    if place >= 0:
        data[place + 6 : place + 14] = 0  # byte order, magic number, offset
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    # Errors of the C++ decoders begin with the place in their source.
    return str(error).split("\n")[0].split(".cpp:")[-1].lstrip("0123456789, ")
