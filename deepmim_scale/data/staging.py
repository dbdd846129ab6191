"""A copy of a data set's bytes on a node's own disk, made once per node: `--stage-to DIR`.

Ids, labels, bits and SHA are those of the original, whatever kind it is. The copy is one file and
an index. A copy that was interrupted goes on where it stopped; one process of a node makes it while
the others wait.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deepmim_scale.arguments import writable
from deepmim_scale.data.cache import INDEX_NAME, cached_folder
from deepmim_scale.data.container_source import ContainerSource
from deepmim_scale.data.header import HEAD, TAIL, edge_digest, join_edges
from deepmim_scale.data.index import ENTRY, ContainerFile, Index, Names, load_index
from deepmim_scale.data.ordered import map_in_order
from deepmim_scale.data.ranges import OpenFile, RangeReader
from deepmim_scale.data.source import Source, Split
from deepmim_scale.errors import RunFailure, UserError

COPIED = np.dtype([("size", "<u4"), ("digest", "<u4")])  # a line of the journal
BATCH = 256  # images between two entries in the journal
SPARE = 1 << 30  # bytes that stay free


def stage_source(source: Source, split: Split, stage_to: str, threads: int) -> ContainerSource:
    """`source` read from a copy below `stage_to`, which is made first if it is not there.

    Raises UserError if there is no space, RunFailure if an image cannot be read or written.
    """
    folder = cached_folder(Path(source.location), stage_to)
    folder = folder.with_name(f"{folder.name}-{source.sha[:16]}-{split}")
    writable("stage_to", folder / INDEX_NAME)
    saved, images = folder / INDEX_NAME, folder / "images"
    with _one_process(folder):
        if not saved.exists():
            try:
                copied = _copy(source, images, threads, stage_to)
                _verify(images, copied)
            except OSError as error:
                raise RunFailure(
                    f"stage_to={stage_to}: {error.strerror or error}; start again to go on"
                ) from error
            _index(source, copied).save(saved)
    index = load_index(saved, f"remove {folder}")
    if images.stat().st_size != index.files[0].num_bytes:
        raise UserError(f"stage_to={stage_to}: {images} has changed; remove {folder}")
    note = f"read from the copy in {folder}"
    reader = RangeReader([images], index.entries)
    return ContainerSource(source.location, index, source.bad, (*source.notes, note), reader)


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Held by one process of this machine at a time; a process that dies lets it go."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(source: Source, images: Path, threads: int, stage_to: str) -> np.ndarray:
    """Append what is missing of the copy; sizes and digests of all images, COPIED [N]."""
    journal = images.with_name("journal")
    copied = _resume(images, journal)
    done, place = len(copied), int(copied["size"].sum(dtype=np.int64))
    needed = int(getattr(source, "num_bytes", 0)) - place
    free = shutil.disk_usage(images.parent).free
    if needed + SPARE > free:
        raise UserError(
            f"stage_to={stage_to}: {source.location} needs {needed / 1e9:.1f} GB more and "
            f"{SPARE / 1e9:.0f} GB to spare, but {free / 1e9:.1f} GB are free; name another folder"
        )
    print(f"staging {source.describe()} to {images.parent}, image {done:,} on", flush=True)

    def read(sample_id: int) -> bytes:
        if sample_id in source.bad:
            return b""
        try:
            return source.read(sample_id)
        except OSError as error:
            reason = f"{source.name(sample_id)}: {error.strerror or error}"
            raise RunFailure(f"{reason}; run `deepmim-scale data verify`") from error

    progress = tqdm(
        total=len(source), initial=done, unit="img", disable=None, desc=f"stage to {stage_to}"
    )
    lines: list[tuple[int, int]] = []
    with images.open("ab") as file, journal.open("ab") as log, progress:
        for data in map_in_order(read, range(done, len(source)), threads):
            file.write(data)
            lines.append((len(data), edge_digest(data)))
            if len(lines) == BATCH:
                file.flush()
                log.write(np.array(lines, COPIED).tobytes())
                log.flush()
                progress.update(len(lines))
                lines.clear()
        log.write(np.array(lines, COPIED).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return np.fromfile(journal, COPIED)


def _resume(images: Path, journal: Path) -> np.ndarray:
    """What an interrupted copy holds for certain; cuts off the rest."""
    if not (images.exists() and journal.exists()):
        images.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        return np.empty(0, COPIED)
    whole = journal.stat().st_size // COPIED.itemsize
    copied = np.fromfile(journal, COPIED, whole)
    ends = np.cumsum(copied["size"], dtype=np.int64)
    # A machine that went down may have kept the journal and lost the end of the images.
    copied = copied[: np.searchsorted(ends, images.stat().st_size, side="right")]
    os.truncate(journal, len(copied) * COPIED.itemsize)
    os.truncate(images, int(copied["size"].sum(dtype=np.int64)))
    return copied


def _verify(images: Path, copied: np.ndarray) -> None:
    """Read both ends of every image back; raises OSError where they are others."""
    file, place = OpenFile(images), 0
    for i, (size, digest) in enumerate(copied.tolist()):
        head = file.read(place, min(HEAD, size))
        tail_size = min(TAIL, size)
        if join_edges(head, file.read(place + size - tail_size, tail_size)) != digest:
            raise OSError(f"image {i} differs in {images}; remove that file")
        place += size


def _index(source: Source, copied: np.ndarray) -> Index:
    entries = np.zeros(len(source), ENTRY)
    sizes = copied["size"]
    entries["offset"][1:] = np.cumsum(sizes, dtype=np.int64)[:-1]
    for field in ("stored", "unpacked", "size"):
        entries[field] = sizes
    entries["digest"] = copied["digest"]
    entries["label"] = source.labels
    entries["height"], entries["width"] = source.sizes.T
    names = Names.pack(source.name(i) for i in range(len(source)))
    file = ContainerFile("images", int(sizes.sum(dtype=np.int64)))
    return Index((file,), source.classes, (), source.sha, entries, names)
