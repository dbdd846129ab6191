"""Where the values of a parquet column lie: its pages, read without a library.

No library says it, and reading whole row groups for single images takes a hundred times the bytes.
Values are found by their content, so that no encoding of indices or repetition has to be
understood. Layout: https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

import hashlib
from typing import Any

from deepmim_scale.data.container_members import DamagedError
from deepmim_scale.data.index import MAX_BYTES
from deepmim_scale.data.ranges import unpack

Place = tuple[int, int, int, int, int]  # offset, stored, codec, inner, unpacked, as in index.ENTRY

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
# Fields of a page's header by their numbers in parquet.thrift.
TYPE, UNPACKED, PACKED, HEADER_V1, HEADER_V2 = 1, 2, 3, 5, 8
ENCODING_V1, ENCODING_V2, DEFINITION_BYTES, REPETITION_BYTES, IS_COMPRESSED = 2, 4, 5, 6, 7
PLAIN = 0


def fingerprint(data: memoryview) -> bytes:
    """What `locate_values` knows a value by."""
    return hashlib.sha256(data).digest()


def locate_values(raw: bytes, start: int, codec: int, has_levels: bool) -> dict[bytes, Place]:
    """Digest of every value of a column chunk -> (offset, stored, codec, inner, unpacked)."""
    places: dict[bytes, Place] = {}
    at = 0
    while at < len(raw):
        header, at = _read_struct(raw, at)
        stored, unpacked, kind = header[PACKED], header[UNPACKED], header[TYPE]
        if not 0 <= stored <= len(raw) - at or not 0 <= unpacked <= MAX_BYTES:
            raise DamagedError("has a damaged page header")
        levels, page_codec, encoding = 0, codec, PLAIN
        if kind == DATA_PAGE:
            encoding = header[HEADER_V1][ENCODING_V1]
        elif kind == DATA_PAGE_V2:
            second = header[HEADER_V2]
            encoding = second[ENCODING_V2]
            levels = second[DEFINITION_BYTES] + second[REPETITION_BYTES]  # never compressed
            page_codec = codec if second.get(IS_COMPRESSED, True) else 0
        if encoding == PLAIN and kind in (DATA_PAGE, DATA_PAGE_V2, DICTIONARY_PAGE):
            page = raw[at + levels : at + stored]
            place = (start + at + levels, stored - levels, page_codec, unpacked - levels)
            values = unpack(page, page_codec, place[3]) if page_codec else page
            skip = 0
            if kind == DATA_PAGE and has_levels:
                skip = 4 + int.from_bytes(values[:4], "little")
            _note_values(values, skip, place, places)
        at += stored
    return places


def _note_values(
    values: bytes,
    skip: int,
    place: tuple[int, int, int, int],
    places: dict[bytes, Place],
) -> None:
    offset, stored, codec, unpacked = place
    view = memoryview(values)
    while skip + 4 <= len(values):
        size = int.from_bytes(values[skip : skip + 4], "little")
        skip += 4
        if skip + size > len(values):
            raise DamagedError("has a damaged page")
        found = (
            (offset, stored, codec, skip, unpacked) if codec else (offset + skip, size, 0, 0, size)
        )
        places[fingerprint(view[skip : skip + size])] = found
        skip += size


# Thrift's compact protocol, as far as page headers use it.
# https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
TRUE, FALSE, BYTE, LAST_INTEGER, DOUBLE, BINARY, STRUCT = 1, 2, 3, 6, 7, 8, 12


def _read_struct(raw: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct by their numbers, and its end; IndexError where bytes are missing."""
    fields: dict[int, Any] = {}
    number = 0
    while raw[at]:
        delta, kind = raw[at] >> 4, raw[at] & 15
        at += 1
        if delta:
            number += delta
        else:
            number, at = _read_integer(raw, at)
        fields[number], at = _read_value(raw, at, kind)
    return fields, at + 1


def _read_value(raw: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, at
    if kind == BYTE:
        return raw[at], at + 1
    if kind <= LAST_INTEGER:
        return _read_integer(raw, at)
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        size, at = _read_varint(raw, at)
        return raw[at : at + size], at + size
    if kind == STRUCT:
        return _read_struct(raw, at)
    raise IndexError(f"thrift type {kind} in a page header")


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _read_integer(raw: bytes, at: int) -> tuple[int, int]:
    """A zigzag integer."""
    value, at = _read_varint(raw, at)
    return value >> 1 ^ -(value & 1), at
