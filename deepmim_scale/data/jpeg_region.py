"""Regions of JPEGs, decoded without the rest: jpeg_region.c, compiled when it is first used.

Optional: without a C compiler or libjpeg-turbo's headers whole images are decoded, and cut. Of the
libraries with wheels, nvImageCodec decodes regions, but not at a fraction of the size.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("jpeg_region.c")
COMPILE_SECONDS = 60
END_OF_IMAGE = b"\xff\xd9"


def decode_region(
    data: bytes, full_size: tuple[int, int], box: tuple[int, int, int, int], divisor: int = 1
) -> np.ndarray | None:
    """Box (top, left, height, width) of the image at 1/`divisor` of its size, uint8 RGB [h, w, 3].

    `full_size` is (height, width) as the header has it, `divisor` 1, 2, 4 or 8. None if another
    decoder must take the image: it is no plain JPEG, cut short, damaged, or nothing was compiled.
    """
    library = _library()
    # Data that end early may hold the region, but the image as a whole is bad.
    if library is None or data[:2] != b"\xff\xd8" or data.rstrip(b"\0")[-2:] != END_OF_IMAGE:
        return None
    top, left, height, width = box
    out = np.empty((height, width, 3), np.uint8)
    numbers = (*full_size, divisor, top, left, height, width)
    failed = library.decode_region(data, len(data), *numbers, out.ctypes.data)
    return None if failed else out


def is_available() -> bool:
    """Whether the C file could be compiled and loaded."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    unsigned = ctypes.c_uint
    library.decode_region.argtypes = [
        ctypes.c_char_p,
        ctypes.c_ulong,
        *[unsigned] * 7,
        ctypes.c_void_p,
    ]
    library.decode_region.restype = ctypes.c_int
    return library


def _compiled() -> Path:
    """The shared library, made by the first process that wants it; OSError if that cannot be."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("no C compiler")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepmim_scale"
    library = cache / f"jpeg_region-{digest}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may do so at once; each replaces the file by an equal one.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ljpeg"]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
            made.replace(library)
    return library
