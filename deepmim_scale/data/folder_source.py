"""A folder of images as a source, with what `data verify` found bad in it.

Bad files keep their ids: the order of all others, and so what everybody trains on, does not depend
on which files are bad.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepmim_scale.data.cache import MANIFEST_NAME, QUARANTINE_NAME, find_listing, listing_folder
from deepmim_scale.data.manifest import Manifest, load_manifest, scan_folder
from deepmim_scale.data.quarantine import known_bad
from deepmim_scale.data.source import SPLITS, OnBad, Split
from deepmim_scale.errors import UserError


@dataclass(frozen=True, eq=False)
class FolderSource:
    """The files of one folder, in the order of its manifest."""

    manifest: Manifest
    bad: Mapping[int, str]
    """Quarantined files and those with unreadable headers: id -> reason."""
    notes: tuple[str, ...]

    @property
    def location(self) -> str:
        """The folder."""
        return self.manifest.root

    @property
    def sha(self) -> str:
        """SHA-256 over the names and sizes of all files."""
        return self.manifest.sha

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [N]."""
        return self.manifest.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders; a flat folder has one, `.`."""
        return self.manifest.classes

    @property
    def sizes(self) -> np.ndarray:
        """Heights and widths, int32 [N, 2]."""
        return self.manifest.sizes

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return int(self.manifest.num_bytes.sum())

    def __len__(self) -> int:
        return len(self.manifest)

    def name(self, sample_id: int) -> str:
        """Path of a file."""
        return os.path.join(self.manifest.root, self.manifest.names[sample_id])

    def read(self, sample_id: int) -> bytes:
        """Bytes of a file; raises OSError."""
        return Path(self.name(sample_id)).read_bytes()

    def describe(self) -> str:
        """One line: number of images and classes, folder, SHA."""
        return self.manifest.describe()


def find_split(data: str, split: Split) -> Path | None:
    """The folder of `train` or `val`: DIR/<split>; for `train` else DIR itself, for `val` None.

    Raises UserError if DIR is missing, has val but no train (its classes would mix), or calls val
    `validation`.
    """
    root = Path(data)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        parent = next(path for path in root.absolute().parents if path.is_dir())
        raise UserError(
            f"data={data}: must be an image folder, found {found} ({parent} exists); "
            "`deepmim-scale data samples DIR` writes a small one"
        )
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    if has_train and not has_val and (root / "validation").is_dir():
        raise UserError(f"data={data}: has a folder validation; rename it to val")
    if has_val and not has_train and split == "train":
        raise UserError(f"data={data}: has a folder val but no train; rename or add train")
    if split == "val":
        return root / "val" if has_val else None
    return root / "train" if has_train else root


def open_split(data: str, split: Split, on_bad: OnBad, cache: str) -> FolderSource | None:
    """The `train` or `val` folder of `data` as a source; None if there is no `val`."""
    folder = find_split(data, split)
    return open_folder(folder, on_bad, cache) if folder else None


def open_folder(root: str | Path, on_bad: OnBad = "fail", cache: str = "") -> FolderSource:
    """One folder by its saved manifest or a scan, with its quarantine.

    Raises UserError if the saved manifest does not match the files that are there now, if no image
    is good, or, with on_bad `fail`, if headers of files that are not quarantined are unreadable.
    """
    root = Path(root)
    saved = find_listing(root, cache, MANIFEST_NAME)
    manifest = load_manifest(root, saved) if saved.exists() else scan_folder(root)
    flag = f" --cache {cache}" if cache else ""
    bad, notes = known_bad(
        str(root),
        manifest.names,
        manifest.sizes,
        find_listing(root, cache, QUARANTINE_NAME),
        on_bad,
        f"data verify {root}{flag}",
    )
    return FolderSource(manifest, bad, (*manifest.notes, *notes))


def scan(path: str, cache: str, labels: str) -> list[str]:
    """Write the manifest of every split; what there is to say about them, one line each."""
    if labels:
        raise UserError(f"labels={labels}: {path} is a folder, whose names are its classes")
    lines = []
    for folder, listings in _split_folders(path, cache):
        manifest = scan_folder(folder)
        manifest.save(listings / MANIFEST_NAME)
        lines += [manifest.describe(), *manifest.notes]
        unreadable = int((manifest.sizes[:, 0] == 0).sum())
        if unreadable:
            lines.append(
                f"{unreadable} headers cannot be read; run `deepmim-scale data verify {path}`"
            )
    return lines


def verify(path: str, cache: str, threads: int) -> list[dict[str, Any]]:
    """Decode every image of every split once; the reports (verify.verify_images)."""
    from deepmim_scale.data.verify import verify_folder

    folders = _split_folders(path, cache)
    return [verify_folder(folder, threads, listings) for folder, listings in folders]


def listing(path: str, cache: str, name: str, write: bool) -> Path:
    """The file `name` about the training images, to be read or written."""
    folder = find_split(path, "train")
    assert folder is not None, "find_split raises where there is nothing to train on"
    return listing_folder(folder, cache) / name if write else find_listing(folder, cache, name)


def _split_folders(data: str, cache: str) -> list[tuple[Path, Path]]:
    """The folder of each split, and where its listings are written; UserError if they cannot."""
    folders = [find_split(data, split) for split in SPLITS]
    return [(folder, listing_folder(folder, cache)) for folder in folders if folder]
