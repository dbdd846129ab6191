"""Images in containers as a source: read by range, from an index that a scan wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepmim_scale.data.cache import (
    INDEX_NAME,
    QUARANTINE_NAME,
    container_listing_folder,
    find_container_listing,
)
from deepmim_scale.data.containers import Shard, find_shards, scan_containers
from deepmim_scale.data.index import ContainerFile, Index, load_index
from deepmim_scale.data.quarantine import known_bad
from deepmim_scale.data.ranges import RangeReader
from deepmim_scale.data.source import SPLITS, OnBad, Split
from deepmim_scale.errors import UserError


@dataclass(frozen=True, eq=False)
class ContainerSource:
    """The images of one split, in the order of its index."""

    location: str
    """The path that was given, a file or a folder of containers."""
    index: Index
    bad: Mapping[int, str]
    """Quarantined images and those with unreadable headers: id -> reason."""
    notes: tuple[str, ...]
    reader: RangeReader

    @property
    def sha(self) -> str:
        """SHA-256 over the names and sizes of all images."""
        return self.index.sha

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [N]."""
        return self.index.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a single `.` where there are none."""
        return self.index.classes

    @property
    def sizes(self) -> np.ndarray:
        """Heights and widths, int32 [N, 2]."""
        return self.index.sizes

    @property
    def num_bytes(self) -> int:
        """Of all images together."""
        return int(self.index.entries["size"].sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.index)

    def name(self, sample_id: int) -> str:
        """The container and the image in it."""
        file = self.index.files[int(self.index.entries["file"][sample_id])]
        return f"{file.path}:{self.index.names[sample_id]}"

    def read(self, sample_id: int) -> bytes:
        """Bytes of an image; raises OSError, also if it is not the one that was scanned."""
        return self.reader.read(sample_id)

    def read_ahead(self, sample_ids: np.ndarray) -> None:
        """Let the system fetch these images, int64 [B], while others are decoded."""
        self.reader.read_ahead(sample_ids)

    def describe(self) -> str:
        """One line: number of images and classes, place, SHA."""
        return self.index.describe(self.location)


def is_container(path: str) -> bool:
    """Whether a path is a container or a folder of them."""
    return bool(find_shards(path))


def open_split(path: str, split: Split, on_bad: OnBad, cache: str) -> ContainerSource | None:
    """The `train` or `val` images of containers; None if there is no `val`.

    Without an index they are scanned, by every process that opens them. Raises UserError if the
    index does not match the files, if no image is good, or, with on_bad `fail`, if headers of
    images that are not quarantined are unreadable.
    """
    shards = find_shards(path)
    index = _saved_index(path, shards, split, cache)
    if index is None:
        if _saved_index(path, shards, "train", cache):
            return None
        index = scan_containers(path, shards).get(split)
    if index is None:
        return None
    quarantine = find_container_listing(path, split, cache, QUARANTINE_NAME)
    flag = f" --cache {cache}" if cache else ""
    bad, notes = known_bad(
        path, index.names, index.sizes, quarantine, on_bad, f"data verify {path}{flag}"
    )
    base = Path(path).parent if Path(path).is_file() else Path(path)
    paths = [base / file.path for file in index.files]
    reader = RangeReader(paths, index.entries)
    return ContainerSource(path, index, bad, (*index.notes, *notes), reader)


def scan(path: str, cache: str, labels: str) -> list[str]:
    """Write the index of every split; what there is to say about them, one line each."""
    container_listing_folder(path, "train", cache)  # before the work, if it cannot be written
    indexes = scan_containers(path, find_shards(path), labels)
    lines = []
    for split in SPLITS:
        index = indexes.get(split)
        if index is None:  # what an earlier scan found
            find_container_listing(path, split, cache, INDEX_NAME).unlink(missing_ok=True)
            continue
        index.save(container_listing_folder(path, split, cache) / INDEX_NAME)
        lines += [index.describe(f"{path}, {split}"), *index.notes]
        unreadable = int((index.entries["height"] == 0).sum())
        if unreadable:
            lines.append(
                f"{unreadable} headers cannot be read; run `deepmim-scale data verify {path}`"
            )
    return lines


def verify(path: str, cache: str, threads: int) -> list[dict[str, Any]]:
    """Decode every image of every split once; the reports (verify.verify_images)."""
    from deepmim_scale.data.verify import verify_images

    reports = []
    for split in SPLITS:
        source = open_split(path, split, "replace", cache)
        if source is not None:
            folder = container_listing_folder(path, split, cache)
            where = f"{path}, {split}"
            names = list(source.index.names)
            reports.append(verify_images(where, names, source.sha, source.read, threads, folder))
    return reports


def listing(path: str, cache: str, name: str, write: bool) -> Path:
    """The file `name` about the training images, to be read or written."""
    if write:
        return container_listing_folder(path, "train", cache) / name
    return find_container_listing(path, "train", cache, name)


def _saved_index(path: str, shards: list[Shard], split: Split, cache: str) -> Index | None:
    saved = find_container_listing(path, split, cache, INDEX_NAME)
    if not saved.exists():
        return None
    flag = f" --cache {cache}" if cache else ""
    again = f"run `deepmim-scale data scan {path}{flag}` again"
    index = load_index(saved, again)
    root = Path(path)
    base = root.parent if root.is_file() else root
    there = {
        ContainerFile(str(shard.path.relative_to(base)), shard.path.stat().st_size)
        for shard in shards
    }
    if set(index.files) != there:
        changed = sorted(file.path for file in there ^ set(index.files))
        raise UserError(f"data={path}: {saved} is stale ({changed[0]} changed); {again}")
    return index
