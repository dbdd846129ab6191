"""Which kind of source a path is. A new kind is one new file and one line of KINDS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepmim_scale.data import container_source, folder_source
from deepmim_scale.data.source import OnBad, Source, Split


@dataclass(frozen=True)
class SourceKind:
    """How to recognize and open one kind of source."""

    accepts: Callable[[str], bool]
    """Whether a path is of this kind, by its name or its first bytes."""
    open: Callable[[str, Split, OnBad, str], Source | None]
    """(path, split, on_bad, cache) -> source; None if the path has no such split."""
    scan: Callable[[str, str, str], list[str]] | None = None
    """(path, cache, labels) -> lines; writes listings. None: there is nothing to list."""
    verify: Callable[[str, str, int], list[dict[str, Any]]] | None = None
    """(path, cache, threads) -> a report per split; writes quarantines. None: nothing to check."""
    listing: Callable[[str, str, str, bool], Path] | None = None
    """(path, cache, file name, whether to write) -> a file about the training images."""


# The first kind that accepts a path opens it. Folders come last: their messages serve any path.
KINDS = [
    SourceKind(
        accepts=container_source.is_container,
        open=container_source.open_split,
        scan=container_source.scan,
        verify=container_source.verify,
        listing=container_source.listing,
    ),
    SourceKind(
        accepts=lambda path: True,
        open=folder_source.open_split,
        scan=folder_source.scan,
        verify=folder_source.verify,
        listing=folder_source.listing,
    ),
]


def register_source(kind: SourceKind) -> None:
    """Add a kind; it is asked before all that are there."""
    KINDS.insert(0, kind)


def open_source(path: str, split: Split, on_bad: OnBad = "fail", cache: str = "") -> Source | None:
    """The `train` or `val` part of the data at `path`; None if there is no `val`.

    `cache` is a folder for listings ("": beside the images). Raises UserError if the data cannot
    be used, or, with on_bad `fail`, if headers are unreadable.
    """
    return find_kind(path).open(path, split, on_bad, cache)


def find_kind(path: str) -> SourceKind:
    """The first kind that accepts `path`."""
    return next(kind for kind in KINDS if kind.accepts(path))
