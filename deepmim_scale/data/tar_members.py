"""The images in a tar file: class folders, tars within the tar (ILSVRC), or WebDataset samples.

Plain headers are read here, ten times as fast as tarfile does; tarfile reads all others (long
names, large sizes, pax). Nothing is extracted, links are not followed, pickles are not opened.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepmim_scale.data.container_members import (
    DamagedError,
    Found,
    is_hidden,
    is_image,
    measure_range,
    tidy_name,
)
from deepmim_scale.data.header import HEAD
from deepmim_scale.data.ranges import OpenFile

BLOCK = 512
ARRAY = ".npy"
ADLER_MODULUS = 65521
MAX_SIDECAR = 1 << 20  # bytes of a label file
HEADER_WINDOWS = (1 << 13, 1 << 21)  # bytes that all headers of one entry may take together
LABEL_KEYS = ("label", "cls", "class_id")  # of a WebDataset's .json


class _Entry(NamedTuple):
    kind: bytes
    name: str
    offset: int
    size: int
    head: bytes
    """The first bytes of its content, HEAD of them at most, or none."""


@dataclass(frozen=True)
class _Region:
    """A tar, or one within it: bytes [start, end) of a file."""

    file: OpenFile
    start: int
    end: int


def list_tar(file: OpenFile, others: Counter[str]) -> Iterator[Found]:
    """The images of a tar; counts in `others` what is none. Raises DamagedError."""
    yield from _list_region(_Region(file, 0, len(file)), others, nested="")


def _list_region(region: _Region, others: Counter[str], nested: str) -> Iterator[Found]:
    images: list[Found] = []
    sidecars: dict[str, list[_Entry]] = {}
    for entry in _walk(region):
        name = tidy_name(entry.name)
        if is_hidden(name) or entry.kind == tarfile.DIRTYPE:
            continue
        if entry.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            others["links"] += 1
            continue
        if entry.kind != tarfile.REGTYPE:
            others["special files"] += 1
            continue
        if is_image(name):
            full = nested + name
            images.append(measure_range(region.file, full, entry.offset, entry.size, entry.head))
            continue
        extension = os.path.splitext(name)[1].lower()
        if extension in (".cls", ".json"):
            sidecars.setdefault(_key(nested + name), []).append(entry)
        elif extension == ".tar" and not nested:
            inner = _Region(region.file, entry.offset, entry.offset + entry.size)
            folder = os.path.splitext(os.path.basename(name))[0]
            yield from _list_region(inner, others, nested=f"{folder}/")
        else:
            others[extension or "no extension"] += 1
    if any(image.name.endswith(ARRAY) for image in images):
        # Beside a picture of the same sample an array is something else, such as features.
        pictures = {_key(image.name) for image in images if not image.name.endswith(ARRAY)}
        kept = [i for i in images if not i.name.endswith(ARRAY) or _key(i.name) not in pictures]
        others[ARRAY] += len(images) - len(kept)
        images = kept
    if not sidecars:
        yield from images
        return
    # Files of no image are no labels: a folder may have them for other reasons.
    for key in sidecars.keys() - {_key(image.name) for image in images}:
        for sidecar in sidecars.pop(key):
            others[os.path.splitext(sidecar.name)[1]] += 1
    for image in images:
        label, name = None, image.name
        for sidecar in sidecars.get(_key(name), ()):
            found, called = _label(region.file, sidecar)
            label = found if label is None else label
            name = called or name
        yield image._replace(name=name, label=label)


def _key(name: str) -> str:
    """What the files of one WebDataset sample share: the path up to the name's first dot."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


def _label(file: OpenFile, sidecar: _Entry) -> tuple[int | str | None, str]:
    """Label and, where a .json has it, the original name of the image."""
    if sidecar.size > MAX_SIDECAR:
        raise DamagedError(
            f"{sidecar.name} has {sidecar.size} bytes", "it is no label; leave it out"
        )
    text = file.read(sidecar.offset, sidecar.size)
    try:
        if sidecar.name.endswith(".cls"):
            return int(text), ""
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{sidecar.name} holds no label: {error}", "correct it") from error
    if not isinstance(fields, dict):
        return None, ""
    label = next(
        (fields[key] for key in LABEL_KEYS if isinstance(fields.get(key), int | str)), None
    )
    name = fields.get("filename")
    return label, tidy_name(name) if isinstance(name, str) and is_image(name) else ""


def _walk(region: _Region) -> Iterator[_Entry]:
    """All entries in their order."""
    file, place = region.file, region.start
    while place + BLOCK <= region.end:
        # Header and head at once: a scan is as fast as its system calls are few.
        block = file.read(place, min(BLOCK + HEAD, region.end - place))
        if block[0] == 0 and not any(block[:BLOCK]):
            return
        entry = _plain_entry(block, place)
        if entry is None:
            entry, following = _tarfile_entry(region, place)
        else:
            following = entry.offset + -(-entry.size // BLOCK) * BLOCK
        if entry.offset + entry.size > region.end:
            raise DamagedError(f"is cut off within {entry.name}")
        if following <= place:
            raise DamagedError(f"has a damaged header at byte {place}")
        yield entry
        place = following
    raise DamagedError("is cut off: it has no end mark")


def _plain_entry(block: bytes, place: int) -> _Entry | None:
    """A header whose every field is in its block; None if tarfile should read it."""
    content, block = block[BLOCK:], block[:BLOCK]
    kind = block[156:157]
    magic = block[257:265]
    if kind not in b"\x00012345" or magic not in (b"ustar\x0000", b"ustar  \x00"):
        return None
    try:
        size = int(block[124:136].strip(b" \0") or b"0", 8)
        checksum = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    # Adler-32's lower half is 1 + the sum of all bytes, by its modulus; Python's sum is slower.
    bytes_sum = checksum - 8 * ord(" ") + sum(block[148:156])
    if (zlib.adler32(block) & 0xFFFF) != (1 + bytes_sum) % ADLER_MODULUS:
        return None
    name = block[:100].partition(b"\0")[0]
    if magic == b"ustar\x0000" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    kind = tarfile.REGTYPE if kind == b"\0" else kind
    size = size if kind == tarfile.REGTYPE else 0
    return _Entry(kind, os.fsdecode(name), place + BLOCK, size, content[:size])


def _tarfile_entry(region: _Region, place: int) -> tuple[_Entry, int]:
    """The entry at `place` as the standard library reads it, and where the next one begins."""
    reason: Exception | None = None
    for most in HEADER_WINDOWS:
        # Only these bytes are there for tarfile, so that a header's own sizes cannot fill memory.
        window = io.BytesIO(region.file.read(place, min(most, region.end - place)))
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                member = tar.next()
                following = place + tar.offset
        except (tarfile.TarError, ValueError, OSError, RecursionError) as error:
            reason = error
            continue
        if member is None:
            break
        kind = member.type
        if member.isreg():
            kind = tarfile.GNUTYPE_SPARSE if member.issparse() else tarfile.REGTYPE
        size = member.size if kind == tarfile.REGTYPE else 0
        return _Entry(kind, member.name, place + member.offset_data, size, b""), following
    raise DamagedError(f"has a damaged header at byte {place}") from reason
