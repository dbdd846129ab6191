"""Where the listings of a data set lie: beside the images, or in a cache folder.

A cache holds one folder per data set, so that one cache serves many. Listings of containers lie in
a folder per split, beside the containers as `PATH.index/SPLIT`.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from deepmim_scale.arguments import writable
from deepmim_scale.data.source import Split
from deepmim_scale.errors import UserError

MANIFEST_NAME = "manifest.npz"
INDEX_NAME = "index.npz"
QUARANTINE_NAME = "quarantine.txt"
REPORT_NAME = "verify.json"
STATISTICS_NAME = "stats.json"


def cached_folder(folder: Path, cache: str) -> Path:
    """The part of `cache` that belongs to `folder`: a readable name and its path's digest."""
    path = os.path.realpath(folder)
    # Two data sets may both end in "imagenet/train"; only the whole path tells them apart.
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", "/".join(Path(path).parts[-2:])).strip("-.")
    return Path(cache) / f"{readable}-{digest}"


def find_listing(folder: Path, cache: str, name: str) -> Path:
    """The file `name` of `folder`: the cache's if it is there, else the one beside the images."""
    cached = cached_folder(folder, cache) / name if cache else None
    return cached if cached and cached.exists() else folder / name


def listing_folder(folder: Path, cache: str) -> Path:
    """Where listings of `folder` are written; UserError if that cannot be."""
    if not cache:
        if not os.access(folder, os.W_OK):
            raise UserError(f"dir={folder}: is not writable; give --cache DIR for the listings")
        return folder
    # Among the images the cache would count as a class.
    if Path(os.path.realpath(cache)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"cache={cache}: lies inside {folder}; name a folder outside")
    return writable("cache", cached_folder(folder, cache) / MANIFEST_NAME).parent


def find_container_listing(path: str, split: Split, cache: str, name: str) -> Path:
    """The file `name` of a split of containers: the cache's if it is there, else the one beside."""
    cached = cached_folder(Path(path), cache) / split / name if cache else None
    return cached if cached and cached.exists() else _beside(path) / split / name


def container_listing_folder(path: str, split: Split, cache: str) -> Path:
    """Where listings of a split of containers are written; UserError if that cannot be."""
    folder = (cached_folder(Path(path), cache) if cache else _beside(path)) / split
    if not cache and not os.access(folder.parent.parent, os.W_OK):
        raise UserError(
            f"dir={path}: {folder.parent.parent} is not writable; give --cache DIR for the index"
        )
    return writable("cache", folder / INDEX_NAME).parent


def _beside(path: str) -> Path:
    return Path(f"{os.path.abspath(path)}.index")
