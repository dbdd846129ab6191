"""What an image folder holds: files, class labels, header sizes, one SHA over the listing.

A saved manifest (`deepmim-scale data scan DIR`) spares every process the reading of all headers.
Legend: N images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from os.path import exists, isdir, realpath
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deepmim_scale.data.cache import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    REPORT_NAME,
    STATISTICS_NAME,
)
from deepmim_scale.data.header import HEAD, image_size
from deepmim_scale.data.source import name_few, printable
from deepmim_scale.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
OWN_FILES = (MANIFEST_NAME, QUARANTINE_NAME, REPORT_NAME, STATISTICS_NAME, "ATTRIBUTION.txt")
SCAN_THREADS = 8


@dataclass(frozen=True, eq=False)
class Manifest:
    """The images of one folder, sorted by path."""

    root: str
    names: tuple[str, ...]
    """Paths below root, N of them; a sample's id is its place here."""
    labels: np.ndarray
    """Class of each image, int32 [N]."""
    classes: tuple[str, ...]
    """Names of the classes; a flat folder has one, `.`."""
    sizes: np.ndarray
    """Heights and widths in pixels, int32 [N, 2], without EXIF rotation; 0 x 0 if unreadable."""
    num_bytes: np.ndarray
    """File sizes, int64 [N]."""
    notes: tuple[str, ...] = ()
    """What was left out and why, one line each."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def sha(self) -> str:
        """SHA-256 over names and file sizes: the identity of the data set."""
        return listing_sha(zip(self.names, self.num_bytes.tolist(), strict=True))

    def describe(self) -> str:
        """One line: number of images and classes, folder, SHA."""
        classes = f"{len(self.classes)} class{'es' * (len(self.classes) != 1)}"
        return f"{len(self):,} images, {classes} in {printable(self.root)} (sha {self.sha[:8]})"

    def save(self, path: Path) -> None:
        """Write an .npz, atomically."""
        text = {"names": self.names, "classes": self.classes, "notes": self.notes}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez_compressed(
                temporary,
                text=json.dumps(text),
                labels=self.labels,
                sizes=self.sizes,
                num_bytes=self.num_bytes,
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def scan_folder(root: str | Path) -> Manifest:
    """List a folder of class folders, or of images, and read every header.

    A header that cannot be read counts as size 0 x 0. Raises UserError if there are no images or
    if images lie beside class folders.
    """
    root = Path(root)
    listing, notes = list_images(root)
    names = tuple(name for name, _ in listing)
    flat = [name for name in names if "/" not in name]
    if flat and len(flat) < len(names):
        raise UserError(
            f"data={root}: {len(flat)} images (e.g. {printable(flat[0])}) lie beside class folders "
            f"with {len(names) - len(flat)} images; move them into a class folder"
        )
    classes = ["."] if flat else [entry.name for entry in _entries(root) if isdir(entry)]
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number["." if flat else name.split("/")[0]] for name in names], np.int32)
    empty = sorted(set(classes) - {classes[label] for label in labels})
    if empty:
        notes.append(f"empty class folders (they keep their numbers): {name_few(empty)}")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        headers = pool.map(_header, [str(root / name) for name in names])
        progress = tqdm(headers, total=len(names), unit="img", disable=None, desc="headers")
        sizes = np.array(list(progress), np.int32)
    num_bytes = np.array([size for _, size in listing], np.int64)
    return Manifest(str(root), names, labels, tuple(classes), sizes, num_bytes, tuple(notes))


def load_manifest(root: Path, saved: Path) -> Manifest:
    """The manifest of `root` that lies at `saved`; UserError if it is damaged or stale."""
    # A scan keeps a cache where it finds one, so name the one that is meant.
    cache = "" if saved.parent == root else f" --cache {saved.parent.parent}"
    again = f"run `deepmim-scale data scan {root}{cache}` again"
    try:
        with np.load(saved) as arrays:
            text = json.loads(str(arrays["text"]))
            manifest = Manifest(
                str(root),
                tuple(text["names"]),
                arrays["labels"],
                tuple(text["classes"]),
                arrays["sizes"],
                arrays["num_bytes"],
                tuple(text["notes"]),
            )
    except Exception as error:  # flipped bits raise anything, from zlib.error to SyntaxError
        raise UserError(f"data={root}: {saved} cannot be read; {again}") from error
    listing, _ = list_images(root)
    if listing_sha(listing) != manifest.sha:
        raise UserError(
            f"data={root}: {saved} is stale ({len(manifest)} images listed, "
            f"{len(listing)} there, or sizes changed); {again}"
        )
    return manifest


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    visible = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(visible, key=lambda entry: entry.name)


def list_images(root: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """(name below root, file size) in sorted order, and notes on what is no image.

    Links are followed; those that lead nowhere or back to a folder above them are left out.
    """
    found: list[tuple[str, int]] = []
    others: Counter[str] = Counter()
    links: list[str] = []

    def walk(folder: str, prefix: str, above: tuple[str, ...]) -> None:
        above = (*above, realpath(folder))
        for entry in _entries(folder):
            name = prefix + entry.name
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.is_symlink() and (not exists(entry) or realpath(entry) in above):
                links.append(name)
            elif entry.is_dir():
                walk(entry.path, f"{name}/", above)
            elif extension in EXTENSIONS:
                found.append((name, entry.stat().st_size))
            elif entry.name not in OWN_FILES:
                others[extension or "no extension"] += 1

    walk(str(root), "", ())
    notes = []
    if others:
        notes.append(describe_others(others))
    if links:
        notes.append(f"{len(links)} broken or circular links left out: {name_few(links)}")
    if not found:
        raise UserError(
            f"data={root}: no images; found {sum(map(isdir, _entries(root)))} folders and "
            f"{'; '.join(notes) or 'no other files'}; images end in {' '.join(EXTENSIONS)}"
        )
    # By class and then by name, as in every container; "a-b/" sorts before "a/".
    return sorted(found, key=lambda entry: entry[0].split("/", 1)), notes


def describe_others(others: Counter[str]) -> str:
    """Extensions and counts of what is no image, in words."""
    counts = (f"{count} {printable(extension)}" for extension, count in others.most_common(5))
    return f"files of other kinds ignored: {', '.join(counts)}"


def _header(path: str) -> tuple[int, int]:
    """Height and width from the header, 0 x 0 if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            return image_size(head, lambda: head + file.read())
    except OSError:
        return 0, 0


def listing_sha(listing: Iterable[tuple[str, int]]) -> str:
    """SHA-256 over (name, file size)."""
    digest = hashlib.sha256()
    for name, size in listing:
        digest.update(os.fsencode(name) + f"\0{size}\n".encode())
    return digest.hexdigest()
