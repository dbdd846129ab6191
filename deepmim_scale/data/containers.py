"""Which files of a path are containers, and what they all hold together.

Whatever container holds the images, they get the ids, labels and SHA that a folder gives them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from deepmim_scale.data.build_index import build_index
from deepmim_scale.data.container_members import DamagedError, Found, Member, is_image
from deepmim_scale.data.imagenet import DEVKIT, read_labels
from deepmim_scale.data.index import ContainerFile, Index
from deepmim_scale.data.manifest import describe_others
from deepmim_scale.data.parquet_members import class_names, list_parquet
from deepmim_scale.data.ranges import OpenFile
from deepmim_scale.data.source import Split, printable
from deepmim_scale.data.tar_members import list_tar
from deepmim_scale.data.zip_members import list_zip
from deepmim_scale.errors import UserError

SUFFIXES = (".tar", ".zip", ".parquet")
SCAN_THREADS = 8  # shards at once: they hide a network's latency
SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
UNUSED_WORD = "test"
CLASS_FILE = re.compile(r"n\d{8}$")  # ILSVRC's tars of one class are named by it
CLASS_FILES = ("classnames.txt", "classes.txt")  # as CLIP benchmarks and others have them


class Shard(NamedTuple):
    """One container of a data set."""

    path: Path
    split: Split | None
    """By the names of the file and of its folder; None if they do not say."""


def find_shards(path: str) -> list[Shard]:
    """The containers of `path` in order; none if it is something else, as a folder of images.

    A folder has them in itself, in train/, val/ (validation/) or data/.
    """
    root = Path(path)
    if root.is_file():
        return [Shard(root, None)] if root.suffix.lower() in SUFFIXES else []
    folders = [root, *(root / name for name in ("data", *SPLIT_WORDS))]
    files = [
        file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and file.name[0] != "." and file.is_file()
    ]
    if not files or _holds_images(root):
        return []
    words = {file: _split_words(file, root) for file in files}
    return [
        Shard(file, SPLIT_WORDS[found[0]] if found else None)
        for file, found in words.items()
        if UNUSED_WORD not in found
    ]


@contextlib.contextmanager
def _many_objects() -> Iterator[None]:
    """Without looks for cycles among millions of tuples, which have none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_many_objects()
def scan_containers(path: str, shards: list[Shard], labels: str = "") -> dict[Split, Index]:
    """An index for each split of the containers of `path`.

    `labels` is a file that names the classes of images whose container does not
    (`imagenet.read_labels`). Raises UserError if a container is damaged, none holds images, or
    only some have labels.
    """
    root = Path(path)
    base = root.parent if root.is_file() else root
    progress = tqdm(unit="img", disable=None, desc="headers")

    def list_one(shard: Shard) -> tuple[list[Found], Counter[str]]:
        others: Counter[str] = Counter()
        try:
            found = list(_list_shard(shard.path, others))
        except DamagedError as error:
            raise UserError(f"data={path}: {shard.path} {error}") from error
        progress.update(len(found))
        return found, others

    with ThreadPoolExecutor(SCAN_THREADS) as pool, progress:
        listed = list(pool.map(list_one, shards))
    others = sum((more for _, more in listed), Counter[str]())
    notes = [describe_others(others)] if others else []
    members: dict[Split | None, list[Member]] = {}
    for split in {shard.split for shard in shards}:
        rows: list[Member] = []
        images = members.setdefault(split, [])
        for number, (shard, (found, _)) in enumerate(zip(shards, listed, strict=True)):
            if shard.split == split:
                kind = rows if shard.path.suffix.lower() == ".parquet" else images
                kind += [Member(one.name, number, one) for one in found]
        images += _name_rows(rows, shards)
    splits = _split_members(path, members)
    if not any(splits.values()):
        raise UserError(f"data={path}: no images in its containers; {'; '.join(notes) or 'empty'}")
    if not splits.get("train"):
        raise UserError(f"data={path}: has val but no train; rename or add train")
    files = tuple(
        ContainerFile(str(shard.path.relative_to(base)), shard.path.stat().st_size)
        for shard in shards
    )
    known = _read_labels(labels, base)
    names = _class_names(base, shards)
    return {
        split: build_index(
            f"{path} ({split})", files, _name_classes(path, images, known), notes, names
        )
        for split, images in splits.items()
        if images
    }


def _class_names(base: Path, shards: list[Shard]) -> tuple[str, ...]:
    """What labels that are numbers mean: lines of a file beside the containers, or parquet's."""
    for name in CLASS_FILES:
        file = base / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    parquet = (s.path for s in shards if s.path.suffix.lower() == ".parquet")
    return next((names for path in parquet if (names := class_names(path))), ())


def _list_shard(path: Path, others: Counter[str]) -> list[Found]:
    try:
        file = OpenFile(path)
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            found = list(list_parquet(path, file))
        else:
            lister = list_tar(file, others) if suffix == ".tar" else list_zip(path, file, others)
            found = list(lister)
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror or error}") from error
    if CLASS_FILE.match(path.stem) and not any("/" in one.name for one in found):
        return [one._replace(name=f"{path.stem}/{one.name}") for one in found]
    return found


def _split_words(file: Path, root: Path) -> list[str]:
    """Words of train, val and test in the names of a file and of its folder, the folder's first."""
    text = f"{file.parent.name if file.parent != root else ''} {file.stem}".lower()
    return [word for word in re.findall(r"[a-z]+", text) if word in (*SPLIT_WORDS, UNUSED_WORD)]


def _holds_images(root: Path) -> bool:
    return any(is_image(name) for _, _, files in os.walk(root) for name in files)


def _split_members(
    path: str, members: dict[Split | None, list[Member]]
) -> dict[Split, list[Member]]:
    """Images of each split, with names below its folder."""
    unclear = _strip_root(members.pop(None, []))
    tops = {member.name.partition("/")[0] for member in unclear}
    splits: dict[Split, list[Member]] = {"train": [], "val": []}
    if tops & set(SPLIT_WORDS):
        foreign = sorted(tops - set(SPLIT_WORDS))
        if foreign:
            raise UserError(
                f"data={path}: {printable(foreign[0])} lies beside the folders "
                f"{' and '.join(sorted(tops & set(SPLIT_WORDS)))}; leave it out"
            )
        for member in unclear:
            top, _, rest = member.name.partition("/")
            splits[SPLIT_WORDS[top]].append(Member(rest, member.file, member.found))
    else:
        splits["train"] = unclear
    for split, images in members.items():
        assert split is not None, "popped above"
        stripped = _strip_root(images)
        tops = {member.name.partition("/")[0] for member in stripped}
        if len(tops) == 1 and tops <= set(SPLIT_WORDS):
            stripped = [Member(m.name.partition("/")[2], m.file, m.found) for m in stripped]
        splits[split] += stripped
    return splits


def _strip_root(members: list[Member]) -> list[Member]:
    """Without the folders above all images, down to train and val or to the class folders."""
    while members:
        top, slash, _ = members[0].name.partition("/")
        prefix = top + slash
        if not slash or top in SPLIT_WORDS:
            return members
        if not all(m.name.startswith(prefix) and "/" in m.name[len(prefix) :] for m in members):
            return members
        members = [Member(m.name[len(prefix) :], m.file, m.found) for m in members]
    return members


def _name_rows(rows: list[Member], shards: list[Shard]) -> list[Member]:
    """Rows of parquet keep their paths if these tell them apart, else they get numbers."""
    if all(row.name for row in rows) and len({(r.found.label, r.name) for r in rows}) == len(rows):
        return rows
    counts: Counter[int] = Counter()
    named = []
    for row in rows:
        named.append(row._replace(name=f"{shards[row.file].path.stem}-{counts[row.file]:09}"))
        counts[row.file] += 1
    return named


def _read_labels(labels: str, base: Path) -> dict[str, str]:
    """The given file of labels, or ILSVRC's development kit if it lies beside the containers."""
    if labels:
        return read_labels(labels)
    return read_labels(str(base / DEVKIT)) if (base / DEVKIT).exists() else {}


def _name_classes(path: str, members: list[Member], known: dict[str, str]) -> list[Member]:
    """Images that lie flat, without a label, get the class that the file of labels gives them."""
    if not known:
        return members
    named = []
    for member in members:
        name = member.name
        if "/" not in name and member.found.label is None:
            if name not in known:
                raise UserError(f"labels: have no class for {printable(name)} of {path}; add it")
            name = f"{known[name]}/{name}"
        named.append(member._replace(name=name))
    return named
