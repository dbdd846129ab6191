"""What a listing of any container yields, and the rules that all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from deepmim_scale.data.header import EDGE, edge_digest, image_size, join_edges
from deepmim_scale.data.index import MAX_BYTES
from deepmim_scale.data.manifest import EXTENSIONS
from deepmim_scale.data.ranges import OpenFile


class DamagedError(Exception):
    """A container that cannot be listed; the message goes after its path."""


class Found(NamedTuple):
    """One image of a container; the fields from `offset` on are those of index.ENTRY."""

    name: str
    label: int | str | None
    """What the container says beside the name; None if nothing."""
    offset: int
    stored: int
    codec: int
    inner: int
    unpacked: int
    size: int
    digest: int
    height: int
    width: int


class Member(NamedTuple):
    """An image of a data set."""

    name: str
    """Below the folder of the split."""
    file: int
    """Number of its container."""
    found: Found


def is_image(name: str) -> bool:
    """Whether a name ends as one of an image that folders take, too."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether some part of a tidy path begins with a dot; such files are skipped as in folders."""
    return any(part.startswith(".") for part in name.split("/"))


def tidy_name(name: str) -> str:
    """A member's path without empty and `.` parts. It is a label, and never opened."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def measure_range(
    file: OpenFile, name: str, label: int | str | None, offset: int, size: int
) -> Found:
    """An image that lies in the file as it is; one that is too large counts as unreadable."""
    if size > MAX_BYTES:
        return Found(name, label, offset, 0, 0, 0, 0, 0, 0, 0, 0)
    head = file.read(offset, min(EDGE, size))
    tail = head if size <= EDGE else file.read(offset + size - EDGE, EDGE)
    height, width = image_size(head, lambda: file.read(offset, size))
    digest = join_edges(head, tail)
    return Found(name, label, offset, size, 0, 0, size, size, digest, height, width)


def measure_packed(
    name: str,
    label: int | str | None,
    place: tuple[int, int, int, int, int],
    data: Callable[[], bytes] | bytes,
) -> Found:
    """An image out of a packed range; `place` is (offset, stored, codec, inner, unpacked)."""
    image = data if isinstance(data, bytes) else data()
    height, width = image_size(image[:EDGE], lambda: image)
    return Found(name, label, *place, len(image), edge_digest(image), height, width)
