"""Images as they are stored: 1 to 16 channels of 8 or 16 bits, from .npy, TIFF, PNG and others.

Arrays are [height, width] or [height, width, channels]. Pickled ones are never loaded, and no array
is made before its header is believed.
Legend: H x W an image, C channels.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

MAX_CHANNELS = 16
MAX_BYTES = 256 * 1024**2
MAX_HEADER = 4096
_NPY, _TIFFS, _PNG = b"\x93NUMPY", (b"II*\0", b"MM\0*"), b"\x89PNG\r\n\x1a\n"
_PNG_BITS = 24  # place of a PNG's bit depth
_DTYPES = ("|u1", "<u2", ">u2")


def is_npy(data: bytes) -> bool:
    """Whether bytes begin as a file of numpy.save."""
    return data.startswith(_NPY)


def is_tiff(data: bytes) -> bool:
    """Whether bytes begin as a TIFF."""
    return data.startswith(_TIFFS)


def decode_native(data: bytes) -> np.ndarray:
    """uint8 or uint16 [H, W, C]; OSError or ValueError with the reason."""
    if is_npy(data):
        return _decode_npy(data)
    if is_tiff(data):
        return _decode_tiff(data)
    if data.startswith(_PNG) and data[_PNG_BITS : _PNG_BITS + 1] == b"\x10":
        return _decode_deep_png(data)
    with Image.open(io.BytesIO(data)) as image:
        plain = image.convert("RGB") if image.mode == "P" else image
        pixels = np.array(plain.convert("L") if plain.mode == "1" else plain)
    return _checked(pixels.astype(np.uint16) if pixels.dtype.kind == "i" else pixels)


def native_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of .npy, from its first bytes, or of a TIFF; None for anything else."""
    try:
        if is_npy(data):
            (height, width, _), _, _ = _npy_header(data)
            return height, width
        if is_tiff(data):
            height, width, _ = _decode_tiff(data).shape
            return height, width
    except (OSError, ValueError):
        pass
    return None


def _npy_header(data: bytes) -> tuple[tuple[int, int, int], np.dtype[Any], int]:
    """Shape [H, W, C], type and place of the first value."""
    file = io.BytesIO(data[: MAX_HEADER + 16])
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"is .npy of version {version[0]}, not 1 or 2")
    shape, in_columns, dtype = read[version](file, max_header_size=MAX_HEADER)
    if dtype.str not in _DTYPES:
        raise ValueError(f"holds {dtype}, not uint8 or uint16")
    if in_columns or len(shape) not in (2, 3):
        raise ValueError(f"has shape {shape}, not [height, width, channels] in rows")
    shape = (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)
    if shape[2] > MAX_CHANNELS:
        raise ValueError(f"has {shape[2]} channels, more than {MAX_CHANNELS}; they come last")
    if not 0 < shape[0] * shape[1] * shape[2] * dtype.itemsize <= MAX_BYTES:
        raise ValueError(f"has shape {shape}, nothing or more than {MAX_BYTES >> 20} MiB")
    return shape, dtype, file.tell()


def _decode_npy(data: bytes) -> np.ndarray:
    shape, dtype, start = _npy_header(data)
    if len(data) - start != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"has {len(data) - start} bytes of pixels, not those of {shape}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _decode_tiff(data: bytes) -> np.ndarray:
    """By tifffile, which knows more than PIL's four channels."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("is a TIFF, which needs tifffile; pip install tifffile") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            stack = file.series[0]
            if stack.nbytes > MAX_BYTES:
                raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
            pixels = stack.asarray()
            # Planes or pages of one channel each come first.
            planes = pixels.ndim == 3 and stack.axes.endswith("YX")
            return _checked(pixels.transpose(1, 2, 0) if planes else pixels)
    except ValueError:
        raise
    except Exception as error:  # damaged tags raise anything
        raise ValueError(f"is a TIFF that cannot be read ({error})") from None


def _decode_deep_png(data: bytes) -> np.ndarray:
    """16 bits: torchvision keeps them, where PIL does for gray alone."""
    import torch
    from torchvision.io import decode_png

    try:
        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError as error:
        raise ValueError(str(error).split("\n")[0]) from None
    return _checked(pixels.permute(1, 2, 0).contiguous().numpy())


def _checked(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3:
        raise ValueError(f"holds {pixels.dtype} of shape {pixels.shape}, not uint8 or uint16")
    if pixels.shape[2] > MAX_CHANNELS:
        raise ValueError(f"has {pixels.shape[2]} channels, more than {MAX_CHANNELS}")
    return pixels
