"""The images in a zip file, by its central directory; stored or deflated, nothing is extracted."""

from __future__ import annotations

import os
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from deepmim_scale.data.container_members import (
    DamagedError,
    Found,
    is_hidden,
    is_image,
    measure_packed,
    measure_range,
    tidy_name,
)
from deepmim_scale.data.index import MAX_BYTES
from deepmim_scale.data.ranges import DEFLATE, OpenFile, unpack

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and the extra field
ENCRYPTED = 1


def list_zip(path: Path, file: OpenFile, others: Counter[str]) -> Iterator[Found]:
    """The images of a zip; counts in `others` what is none. Raises DamagedError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise DamagedError(f"has a damaged directory: {error}") from error
    for member in members:
        name = tidy_name(member.filename)
        if member.is_dir() or is_hidden(name):
            continue
        if is_image(name):
            yield _measure(file, name, member)
        else:
            others[os.path.splitext(name)[1].lower() or "no extension"] += 1


def _measure(file: OpenFile, name: str, member: zipfile.ZipInfo) -> Found:
    unreadable = Found(name, None, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    try:
        header = file.read(member.header_offset, LOCAL_HEADER.size)
    except (OSError, OverflowError) as error:
        raise DamagedError(f"is cut off before {name}") from error
    signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise DamagedError(f"has no image {name} where its directory says")
    if member.flag_bits & ENCRYPTED or max(member.file_size, member.compress_size) > MAX_BYTES:
        return unreadable
    offset = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
    try:
        if member.compress_type == zipfile.ZIP_STORED:
            return measure_range(file, name, offset, member.compress_size)
        if member.compress_type == zipfile.ZIP_DEFLATED:
            stored, size = member.compress_size, member.file_size
            data = unpack(file.read(offset, stored), DEFLATE, size)
            return measure_packed(name, None, (offset, stored, DEFLATE, 0, size), data)
    except OSError:
        return unreadable  # a bomb, or cut off
    return unreadable
