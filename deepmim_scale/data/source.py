"""What a source of images is: encoded images with labels, in the order of the sample ids.

Legend: N images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
OnBad = Literal["fail", "replace"]


class Source(Protocol):
    """Encoded images with labels; ids, N and `sha` count the bad ones too."""

    @property
    def location(self) -> str:
        """What a user can name: the folder or file, for messages."""

    @property
    def sha(self) -> str:
        """Identity of the data set."""

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [N]."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a single `.` where there are none."""

    @property
    def sizes(self) -> np.ndarray:
        """Heights and widths from the headers, int32 [N, 2], without EXIF rotation."""

    @property
    def bad(self) -> Mapping[int, str]:
        """Samples that must not be decoded: id -> reason."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not used and why, one line each."""

    def __len__(self) -> int:
        """N, all images."""

    def name(self, sample_id: int) -> str:
        """What messages call a sample."""

    def read(self, sample_id: int) -> bytes:
        """The encoded image, as both decoders take it; called on threads. Raises OSError."""

    def describe(self) -> str:
        """One line: number of images and classes, place, SHA."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can use knowing what will be read soon."""

    def read_ahead(self, sample_ids: np.ndarray) -> None:
        """These samples, int64 [B], will be read next; returns at once and never raises."""


def good_ids(source: Source) -> np.ndarray:
    """Ids of the samples that are not known to be bad, int64 [at most N], ascending."""
    return np.setdiff1d(np.arange(len(source)), np.fromiter(source.bad, np.int64))


def printable(name: str) -> str:
    """A file's name on one printable line; one that would not be becomes a JSON string."""
    return name if name.isprintable() else json.dumps(name)


def name_few(names: Sequence[str]) -> str:
    """The first three names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more
