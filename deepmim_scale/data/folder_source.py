"""A folder of images as a source, with what `data verify` found bad in it.

Bad files keep their ids: the order of all others, and so what everybody trains on, does not depend
on which files are bad.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepmim_scale.data.cache import MANIFEST_NAME, QUARANTINE_NAME, find_listing
from deepmim_scale.data.manifest import Manifest, load_manifest, scan_folder
from deepmim_scale.data.source import OnBad, Split, name_few
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
    listed = find_listing(root, cache, QUARANTINE_NAME)
    quarantine = read_quarantine(listed)
    bad = {i: quarantine[name] for i, name in enumerate(manifest.names) if name in quarantine}
    notes = list(manifest.notes)
    if bad:
        notes.append(f"{len(bad)} quarantined images are not used ({listed})")
    no_header = [int(i) for i in np.flatnonzero(manifest.sizes[:, 0] == 0) if i not in bad]
    if no_header:
        names = name_few([manifest.names[i] for i in no_header])
        if on_bad == "fail":
            flag = f" --cache {cache}" if cache else ""
            raise UserError(
                f"data={root}: {len(no_header)} unreadable images: {names}; "
                f"run `deepmim-scale data verify {root}{flag}` or use --on-bad replace"
            )
        notes.append(f"{len(no_header)} unreadable images are not used: {names}")
        bad |= dict.fromkeys(no_header, "the header cannot be read")
    if len(bad) == len(manifest):
        raise UserError(f"data={root}: all {len(bad)} images are bad; see {listed}")
    return FolderSource(manifest, bad, tuple(notes))


def read_quarantine(path: Path) -> dict[str, str]:
    """What `data verify` found bad: name below the folder -> reason; empty if it never ran."""
    if not path.exists():
        return {}
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line)
    # An image's name ends in an extension, so a quote at the end is JSON's.
    return {
        json.loads(name) if name.endswith('"') else name: " ".join(reason)
        for name, *reason in lines
    }
