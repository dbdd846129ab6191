"""What a listing of any container yields, and the rules that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deepmim_scale.data.header import HEAD, TAIL, edge_digest, image_size, join_edges
from deepmim_scale.data.index import MAX_BYTES
from deepmim_scale.data.manifest import EXTENSIONS
from deepmim_scale.data.ranges import OpenFile


class DamagedError(Exception):
    """A container that cannot be listed; the message goes after its path."""

    def __init__(self, problem: str, remedy: str = "copy the file again") -> None:
        super().__init__(f"{problem}; {remedy}")


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
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether some part of a tidy path begins with a dot; such files are skipped as in folders."""
    return name.startswith(".") or "/." in name


def tidy_name(name: str) -> str:
    """A member's path without empty and `.` parts. It is a label, and never opened."""
    if name[:1] in ("/", ".") or "//" in name or "/." in name or name[-1:] == "/":
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


def measure_range(file: OpenFile, name: str, offset: int, size: int, head: bytes = b"") -> Found:
    """An image that lies in the file as it is; one that is too large counts as unreadable.

    `head` may be its first HEAD bytes.
    """
    if size > MAX_BYTES:
        return Found(name, None, offset, 0, 0, 0, 0, 0, 0, 0, 0)
    wanted = min(HEAD, size)
    if len(head) != wanted:
        head = file.read(offset, wanted)
    tail = head[-TAIL:] if size <= HEAD else file.read(offset + size - TAIL, TAIL)
    height, width = image_size(head, lambda: file.read(offset, size))
    return Found(name, None, offset, size, 0, 0, size, size, join_edges(head, tail), height, width)


def measure_packed(
    name: str,
    label: int | str | None,
    place: tuple[int, int, int, int, int],
    data: Callable[[], bytes] | bytes,
) -> Found:
    """An image out of a packed range; `place` is (offset, stored, codec, inner, unpacked)."""
    image = data if isinstance(data, bytes) else data()
    height, width = image_size(image[:HEAD], lambda: image)
    return Found(name, label, *place, len(image), edge_digest(image), height, width)
