"""A packed copy for repeated studies: every image small, in one tar, under the ids it had.

The tar is in the order of the ids and can be read by anything; beside it lies its index. An image
that cannot be decoded becomes an empty file, so that it keeps its id and stays replaced.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from deepmim_scale.data.backend import BadImage
from deepmim_scale.data.build_index import index_of
from deepmim_scale.data.cache import INDEX_NAME, container_listing_folder
from deepmim_scale.data.container_members import Member, measure_range
from deepmim_scale.data.index import ContainerFile
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.ordered import map_in_order
from deepmim_scale.data.ranges import OpenFile
from deepmim_scale.data.source import SPLITS, Source
from deepmim_scale.data.torch_backend import decode_image, resize

BLOCK = tarfile.BLOCKSIZE


def pack_data(path: str, out: Path, cache: str, short_side: int, quality: int, threads: int) -> str:
    """Write the images of all splits of `path` to the tar `out`; one line of what it holds.

    A larger image gets that short side as a JPEG of that quality, any other is copied.
    """
    sources = {split: open_source(path, split, "replace", cache) for split in SPLITS}
    present = {split: source for split, source in sources.items() if source is not None}
    partial = out.with_name(f".{out.name}.partial")
    places: list[tuple[str, int, int]] = []  # name below the split, offset, size
    try:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for split, source in present.items():
                shrunk = _shrink_all(source, short_side, quality, threads)
                for i, data in enumerate(shrunk):
                    name = _name(source, i)
                    member = tarfile.TarInfo(f"{split}/{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    places.append((name, tar.offset - -(-len(data) // BLOCK) * BLOCK, len(data)))
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    file = OpenFile(out)
    files = (ContainerFile(out.name, len(file)),)
    first, counts = 0, []
    for split, source in present.items():
        members = [
            Member(name, 0, measure_range(file, name, offset, size))
            for name, offset, size in places[first : first + len(source)]
        ]
        first += len(source)
        index = index_of(files, source.classes, source.labels, members, ())
        index.save(container_listing_folder(str(out), split, "") / INDEX_NAME)
        counts.append(f"{len(index):,} images of {split}")
    return f"{out}: {' and '.join(counts)}, {len(file) / 1e9:.2f} GB"


def _name(source: Source, sample_id: int) -> str:
    """A class folder and the id, in the order of the ids."""
    if source.classes == (".",):
        return f"{sample_id:08}.jpg"
    name = source.classes[source.labels[sample_id]]
    return f"{name.zfill(len(source.classes[-1])) if name.isdigit() else name}/{sample_id:08}.jpg"


def _shrink_all(source: Source, short_side: int, quality: int, threads: int) -> Iterator[bytes]:
    """The images in the order of their ids."""

    def shrink(sample_id: int) -> bytes:
        if sample_id in source.bad:
            return b""
        try:
            data = source.read(sample_id)
            if min(source.sizes[sample_id].tolist()) <= short_side:
                return data
            return _encode(decode_image(data), short_side, quality)
        except (OSError, BadImage):
            return b""

    progress = tqdm(total=len(source), unit="img", disable=None, desc="pack")
    with progress:
        for data in map_in_order(shrink, range(len(source)), threads):
            yield data
            progress.update()


def _encode(image: np.ndarray, short_side: int, quality: int) -> bytes:
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    small = resize(
        image, max(short_side, round(height * scale)), max(short_side, round(width * scale))
    )
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(small)).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()
