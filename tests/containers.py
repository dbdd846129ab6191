"""A folder DIR/train/<class>, DIR/val/<class> of images, packed as people have them."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Item = tuple[str, int, Path]  # path below the split, label, file


def images_of(folder: Path, split: str) -> list[Item]:
    """All images of a split, in no useful order."""
    classes = sorted(path.name for path in (folder / split).iterdir() if path.is_dir())
    items = [
        (str(file.relative_to(folder / split)), classes.index(name), file)
        for name in classes
        for file in (folder / split / name).rglob("*")
        if file.suffix in (".jpg", ".png", ".JPEG")
    ]
    random.Random(0).shuffle(items)
    return items


def add_bytes(tar: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(folder: Path, out: Path) -> Path:
    """One tar of everything, below a folder, as `tar cf` makes it."""
    path = out / "set.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, arcname="images")
    return path


def write_zip(folder: Path, out: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """One zip of everything."""
    path = out / "set.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for split in ("train", "val"):
            for name, _, file in images_of(folder, split):
                archive.write(file, f"{split}/{name}")
    return path


def write_nested(folder: Path, out: Path) -> Path:
    """A tar of one tar per class for each split, as ILSVRC's training images come."""
    for split in ("train", "val"):
        items = images_of(folder, split)
        with tarfile.open(out / f"ILSVRC2012_img_{split}.tar", "w") as outer:
            for name in sorted({name.split("/")[0] for name, _, _ in items}):
                buffer = io.BytesIO()
                with tarfile.open(fileobj=buffer, mode="w") as inner:
                    for path, _, file in items:
                        if path.startswith(f"{name}/"):
                            inner.add(file, arcname=path.removeprefix(f"{name}/"))
                add_bytes(outer, f"{name}.tar", buffer.getvalue())
    return out


def write_webdataset(folder: Path, out: Path, shards: int = 3) -> Path:
    """Shards of samples with labels in .cls (train) or .json (val), in a random order."""
    for split in ("train", "val"):
        items = images_of(folder, split)
        for number in range(shards):
            # A time with a fraction makes pax headers, as WebDataset's own writer does.
            with tarfile.open(out / f"set-{split}-{number:06}.tar", "w") as tar:
                for name, label, file in items[number::shards]:
                    key, dot, extension = name.replace("/", "_").rpartition(".")
                    add_bytes(tar, key + dot + extension, file.read_bytes(), mtime=1.5)
                    text = str(label) if split == "train" else json.dumps({"label": label})
                    kind = "cls" if split == "train" else "json"
                    add_bytes(tar, f"{key}.{kind}", text.encode(), mtime=1.5)
    return out


def write_parquet(folder: Path, out: Path, compression: str = "snappy", **options: Any) -> Path:
    """Hugging Face's layout: data/SPLIT-NUMBER-of-TOTAL.parquet with image and label."""
    import pyarrow as pa
    from pyarrow import parquet

    (out / "data").mkdir(parents=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "val"):
        items = images_of(folder, split)
        word = {"train": "train", "val": "validation"}[split]
        for number in range(2):
            rows = items[number::2]
            images = [{"bytes": f.read_bytes(), "path": n.replace("/", "_")} for n, _, f in rows]
            table = pa.table({"image": pa.array(images, kind), "label": [row[1] for row in rows]})
            path = out / "data" / f"{word}-{number:05}-of-00002.parquet"
            parquet.write_table(table, path, compression=compression, row_group_size=100, **options)
    return out


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "tar": write_tar,
    "zip": write_zip,
    "ilsvrc": write_nested,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


def pack(folder: Path, out: Path, kinds: Iterator[str] | None = None) -> dict[str, Path]:
    """Every kind of container of `folder`, each in a folder of its own below `out`."""
    packed = {}
    for kind in kinds or WRITERS:
        (out / kind).mkdir(parents=True)
        packed[kind] = WRITERS[kind](folder, out / kind)
    return packed
