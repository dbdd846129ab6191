"""The images in a parquet file as hubs store them: a column of bytes (and paths), one of labels.

pyarrow reads the file once, for the scan. Training then reads single pages (about a megabyte, the
writer's choice) instead of row groups of hundreds, and the image alone where pages are not
compressed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deepmim_scale.data.container_members import DamagedError, Found, measure_packed, tidy_name
from deepmim_scale.data.index import CODECS, MAX_BYTES
from deepmim_scale.data.parquet_pages import fingerprint, locate_values
from deepmim_scale.data.ranges import OpenFile
from deepmim_scale.errors import UserError

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "bytes"), ("label", "labels", "cls", "class")
MAX_GROUP = 1 << 32  # bytes of the images of one row group, which a scan holds in memory


class _Columns(NamedTuple):
    image: str
    """Leaf column of the images, e.g. `image.bytes`."""
    label: str
    """"" if there is none."""
    class_names: tuple[str, ...] = ()
    """What the numbers of the labels mean, where Hugging Face's description says it."""


def list_parquet(path: Path, file: OpenFile) -> Iterator[Found]:
    """The rows of a parquet file in their order, without a name where they have no path.

    Raises DamagedError, or UserError without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"data={path}: parquet needs pyarrow; pip install pyarrow") from error
    try:
        reader = parquet.ParquetFile(path)
        columns = _find_columns(reader)
        row = 0
        for group in range(reader.metadata.num_row_groups):
            for found in _list_group(reader, group, columns, file, row):
                yield found
                row += 1
    except (pyarrow.ArrowException, OSError, LookupError, RecursionError) as error:
        raise DamagedError(f"cannot be read: {' '.join(str(error).split())}") from error


def class_names(path: Path) -> tuple[str, ...]:
    """Names of the labels' numbers, as Hugging Face's description has them; () without one."""
    import pyarrow
    from pyarrow import parquet

    try:
        return _find_columns(parquet.ParquetFile(path)).class_names
    except (pyarrow.ArrowException, OSError, LookupError, RecursionError, DamagedError):
        return ()


def _find_columns(reader: Any) -> _Columns:
    """Which columns hold images and labels, by their types and Hugging Face's description."""
    schema = reader.schema_arrow
    leaves = {reader.schema.column(i).path for i in range(len(reader.schema))}
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(text).get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError):
        features = {}
    described = {name: kind for name, kind in features.items() if isinstance(kind, dict)}

    def of_kind(kind: str) -> list[str]:
        return [name for name, feature in described.items() if feature.get("_type") == kind]

    images = [name for name in [*of_kind("Image"), *IMAGE_COLUMNS] if name in schema.names]
    leaf = next((leaf for name in images for leaf in (f"{name}.bytes", name) if leaf in leaves), "")
    if not leaf:
        raise DamagedError(
            f"has no column of images, but {', '.join(schema.names)}",
            f"call it {' or '.join(IMAGE_COLUMNS)}",
        )
    labels = [name for name in [*of_kind("ClassLabel"), *LABEL_COLUMNS] if name in leaves]
    label = labels[0] if labels else ""
    names = described.get(label, {}).get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return _Columns(leaf, label, tuple(names) if is_list and names else ())


def _list_group(
    reader: Any, group: int, columns: _Columns, file: OpenFile, first_row: int
) -> Iterator[Found]:
    info = reader.metadata.row_group(group)
    paths = [info.column(i).path_in_schema for i in range(info.num_columns)]
    chunk = info.column(paths.index(columns.image))
    if max(chunk.total_compressed_size, chunk.total_uncompressed_size) > MAX_GROUP:
        raise DamagedError(f"has a row group of {chunk.total_uncompressed_size} bytes of images")
    wanted = [columns.image, *([columns.label] if columns.label else [])]
    beside = columns.image.removesuffix(".bytes") + ".path"
    table = reader.read_row_group(group, columns=[*wanted, *([beside] if beside in paths else [])])
    column = table.column(columns.image.split(".")[0]).combine_chunks()
    is_struct = columns.image.endswith(".bytes")
    images = column.field("bytes") if is_struct else column
    names = column.field("path").to_pylist() if beside in paths else [None] * len(images)
    labels = table.column(columns.label).to_pylist() if columns.label else [None] * len(images)
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    definition = reader.schema.column(paths.index(columns.image)).max_definition_level
    raw = file.read(start, chunk.total_compressed_size)
    codec = {"UNCOMPRESSED": ""}.get(chunk.compression, chunk.compression.lower())
    if codec not in CODECS:
        raise DamagedError(f"is compressed as {codec}", "use snappy, zstd or none")
    places = locate_values(raw, start, CODECS.index(codec), definition > 0)
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        row, called = f"row {first_row + i}", tidy_name(name or "")
        data = images[i].as_buffer()
        if data is None or len(data) > MAX_BYTES:
            yield Found(called, label, 0, 0, 0, 0, 0, 0, 0, 0, 0)
            continue
        place = places.get(fingerprint(memoryview(data)))
        if place is None:
            raise DamagedError(
                f"stores {row} in an encoding that is not read", "write it as plain bytes"
            )
        yield measure_packed(called, label, place, bytes(data))
