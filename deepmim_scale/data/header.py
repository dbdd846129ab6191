"""What an encoded image says about itself in its first bytes, and a digest that shows changes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError

from deepmim_scale.data.native_pixels import native_size

HEAD, TAIL = 3584, 512  # bytes at the ends that a scan reads and a digest covers

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # baseline, progressive, ...
_SCAN = 0xDA


def image_size(head: bytes, whole: Callable[[], bytes]) -> tuple[int, int]:
    """Height and width without EXIF rotation, 0 x 0 if the header cannot be read.

    `head` are the file's first bytes; `whole` reads all of it where they do not suffice.
    """
    size = _jpeg_size(head) or _pil_size(head) or native_size(head)
    if size is None:
        try:
            data = whole()
            size = _pil_size(data) or native_size(data)
        except OSError:
            size = None
    return size or (0, 0)


def edge_digest(data: bytes) -> int:
    """CRC-32 over the first HEAD and the last TAIL bytes: shows that a file is another one."""
    return join_edges(data[:HEAD], data[-TAIL:])


def join_edges(head: bytes, tail: bytes) -> int:
    """`edge_digest` of a file of which only both ends were read."""
    return zlib.crc32(tail, zlib.crc32(head))


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Of a JPEG whose segments up to the first scan lie in `head`; ten times as fast as PIL.

    None for whatever PIL might refuse, so that it decides.
    """
    if head[:3] != b"\xff\xd8\xff":
        return None
    place, size = 2, None
    while place + 10 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        if marker == _SCAN:
            return size
        if marker < 0xC0:
            return None
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", head, place + 4)
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 32)
            if bits != 8 or components not in (1, 3, 4) or not 0 < height * width <= limit:
                return None
            size = (height, width)
        place += 2 + int.from_bytes(head[place + 2 : place + 4])
    return None


def _pil_size(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):
        return None
