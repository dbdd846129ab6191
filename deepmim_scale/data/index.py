"""Where every image of some containers lies: one compact array, one file, written by a scan.

1.28 million images take about 100 MB, and no Python object each.
Legend: N images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepmim_scale.data.source import printable
from deepmim_scale.errors import UserError

FORMAT = 1
MAX_BYTES = 1 << 28  # of one image, encoded, and of what must be unpacked to get at it
CODECS = ("", "deflate", "snappy", "gzip", "zstd", "lz4", "brotli")
"""How a range is packed; `deflate` is zip's, the others are parquet's."""

ENTRY = np.dtype(
    [
        ("file", "<u4"),  # place in Index.files
        ("offset", "<i8"),
        ("stored", "<u4"),  # bytes of the range
        ("codec", "u1"),  # place in CODECS
        ("inner", "<u4"),  # where the image begins in the unpacked range
        ("unpacked", "<u4"),  # bytes of the unpacked range
        ("size", "<u4"),  # bytes of the image
        ("digest", "<u4"),  # header.edge_digest of the image
        ("label", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
    ]
)


class Names:
    """N names as one array of bytes and the place where each ends."""

    def __init__(self, characters: np.ndarray, ends: np.ndarray) -> None:
        self.characters, self.ends = characters, ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> Names:
        """From strings, in their order."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.characters[start : self.ends[i]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class ContainerFile(NamedTuple):
    """A container as it was when it was scanned."""

    path: str
    """Below the folder of the data; the file's own name where the data are one file."""
    num_bytes: int


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split, ordered by (label, name); a sample's id is its place here."""

    files: tuple[ContainerFile, ...]
    classes: tuple[str, ...]
    """Names of the classes; a single `.` where there are none."""
    notes: tuple[str, ...]
    """What was left out and why, one line each."""
    sha: str
    """SHA-256 over classes, names and sizes: that of the same images in a folder."""
    entries: np.ndarray
    """ENTRY [N]."""
    names: Names

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [N]."""
        return np.ascontiguousarray(self.entries["label"])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Heights and widths in pixels, int32 [N, 2]; 0 x 0 if unreadable."""
        return np.stack([self.entries["height"], self.entries["width"]], axis=1)

    def describe(self, location: str) -> str:
        """One line: number of images and classes, place, SHA."""
        classes = f"{len(self.classes)} class{'es' * (len(self.classes) != 1)}"
        files = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        place = f"{printable(location)} ({files}, sha {self.sha[:8]})"
        return f"{len(self):,} images, {classes} in {place}"

    def save(self, path: Path) -> None:
        """Write an .npz, atomically; not compressed, so that it loads at once."""
        text = {
            "format": FORMAT,
            "files": self.files,
            "classes": self.classes,
            "notes": self.notes,
            "sha": self.sha,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez(
                temporary,
                text=json.dumps(text),
                entries=self.entries,
                characters=self.names.characters,
                ends=self.names.ends,
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_index(path: Path, again: str) -> Index:
    """The index at `path`; UserError with the remedy `again` if it cannot be used.

    Nothing of it is trusted: a range that leaves its file is refused here.
    """
    try:
        with np.load(path) as arrays:
            text = json.loads(str(arrays["text"]))
            index = Index(
                tuple(ContainerFile(*file) for file in text["files"]),
                tuple(text["classes"]),
                tuple(text["notes"]),
                str(text["sha"]),
                arrays["entries"],
                Names(arrays["characters"], arrays["ends"]),
            )
        problem = "is of another version" if text["format"] != FORMAT else _problem(index)
    except Exception as error:  # flipped bits raise anything, from zlib.error to SyntaxError
        raise UserError(f"data: {path} cannot be read; {again}") from error
    if problem:
        raise UserError(f"data: {path} {problem}; {again}")
    return index


def _problem(index: Index) -> str:
    entries, ends = index.entries, index.names.ends
    if entries.dtype != ENTRY or not len(entries) or len(ends) != len(entries):
        return "holds other arrays than an index"
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(index.names.characters):
        return "has damaged names"
    if (entries["file"] >= len(index.files)).any() or (entries["codec"] >= len(CODECS)).any():
        return "names files that it does not list"
    sizes = np.array([file.num_bytes for file in index.files])[entries["file"]]
    inside = (entries["offset"] >= 0) & (entries["stored"] <= MAX_BYTES)
    inside &= entries["offset"] <= sizes - entries["stored"]
    fits = entries["inner"].astype(np.int64) + entries["size"] <= entries["unpacked"]
    fits &= entries["unpacked"] <= MAX_BYTES
    outside = np.flatnonzero(~(inside & fits))
    if len(outside):
        return f"has a range outside its container ({printable(index.names[int(outside[0])])})"
    if (entries["label"] < 0).any() or (entries["label"] >= len(index.classes)).any():
        return "has labels without a class"
    return ""
