"""Containers that are damaged or made to harm: one line, a replaced image, never a hang."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from containers import add_bytes, images_of, write_parquet, write_tar, write_zip
from PIL import Image

from deepmim_scale.batch import Batch
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data.backend import BadImage
from deepmim_scale.data.choose_backend import build_backend
from deepmim_scale.data.commands import ScanArguments, run_scan
from deepmim_scale.data.index import Index, load_index
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import OnBad, Source
from deepmim_scale.data.step_loader import FeedOptions, Share, Span, build_step_loader
from deepmim_scale.errors import UserError

MODEL = ModelConfig(method="mae", img_size=16, patch_size=4)
CONFIG = RunConfig(model=MODEL, microbatch_size=4, loader_threads=2)


def jpeg(seed: int = 0, height: int = 20, width: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i in range(24):
        path = root / "train" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    (root / "val" / "a").mkdir(parents=True)
    (root / "val" / "a" / "0.jpg").write_bytes(jpeg(99))
    return root


def opened(path: Path, on_bad: OnBad = "fail") -> Source:
    source = open_source(str(path), "train", on_bad)
    assert source is not None
    return source


def scan(path: Path) -> Path:
    """Scans; the index of train."""
    run_scan(ScanArguments(dir=str(path)))
    return Path(f"{path}.index") / "train" / "index.npz"


def load(source: Source, on_bad: OnBad, loader: str = "torch") -> list[Batch]:
    plan = SamplePlan(len(source), 3, 8)
    backend, _ = build_backend(CONFIG, source, 8, torch.device("cpu"), loader)  # type: ignore[arg-type]
    options = FeedOptions(on_bad=on_bad)
    span = Span(0, 3)
    steps = build_step_loader(CONFIG, source, plan, Share(), span, options, backend=backend)
    return [batch for (batch,) in steps]


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.75])
def test_a_truncated_tar_is_refused(folder: Path, tmp_path: Path, keep: float) -> None:
    path = write_tar(folder, tmp_path)
    index = scan(path)
    cut(path, keep)
    with pytest.raises(UserError, match=r"index.npz is stale \(set.tar changed\)"):
        opened(path)
    with pytest.raises(
        UserError, match=r"^data=\S+: \S+set.tar is cut off.*; copy the file again$"
    ):
        run_scan(ScanArguments(dir=str(path)))
    index.unlink()
    with pytest.raises(UserError, match=r"set.tar is cut off.*; copy the file again$"):
        opened(path)


@pytest.mark.parametrize("kind", ["zip", "parquet"])
@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_other_truncated_containers_are_refused(
    folder: Path, tmp_path: Path, kind: str, keep: float
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="an extra: parquet")
        path = next((write_parquet(folder, tmp_path) / "data").glob("train-00000*"))
    else:
        path = write_zip(folder, tmp_path)
    cut(path, keep)
    with pytest.raises(
        UserError, match=r"^data=\S+: \S+ (has a damaged dir|cannot be read).*again$"
    ):
        opened(path)


def test_every_damaged_byte_of_a_tar_is_told_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            add_bytes(tar, f"{i}{'long' * 40}.jpg", jpeg(i), mtime=0.5)
    good, lines, taken = path.read_bytes(), 0, 0
    header = [*range(0, 2048, 3), *range(len(good) - 1024, len(good), 61)]
    for place in header:
        data = bytearray(good)
        data[place] ^= 0x55
        path.write_bytes(data)
        try:
            source = opened(path)
        except UserError as error:
            lines += str(error).count("\n") == 0
        else:
            assert all(isinstance(source.read(i), bytes) for i in range(len(source)))
            taken += 1
    assert lines > 20
    assert taken > 20


def changed(path: Path, change: Callable[[np.ndarray], None]) -> None:
    """Save the index again with other entries."""
    index = load_index(path, "")
    entries = index.entries.copy()
    change(entries)
    Index(index.files, index.classes, (), index.sha, entries, index.names).save(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", -1),
        ("offset", 1 << 40),
        ("stored", 1 << 31),
        ("size", 1 << 31),
        ("inner", 1 << 31),
        ("unpacked", 1 << 31),
    ],
)
def test_a_range_outside_its_container_is_refused(
    folder: Path, tmp_path: Path, field: str, value: int
) -> None:
    path = write_tar(folder, tmp_path)
    index = scan(path)
    changed(index, lambda entries: entries[field].__setitem__(3, value))
    with pytest.raises(
        UserError, match=r"has a range outside its container \(a/06.jpg\); run `dee"
    ):
        opened(path)


def test_an_index_that_lies_about_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    path = write_tar(folder, tmp_path)
    for field, value in (("file", 1), ("codec", 200), ("label", 2), ("label", -1)):
        index = scan(path)
        changed(index, lambda entries, f=field, v=value: entries[f].__setitem__(3, v))  # type: ignore[misc]
        with pytest.raises(UserError, match=r"names files that|has labels without a class"):
            opened(path)
    scan(path).write_bytes(b"PK half a file")
    with pytest.raises(UserError, match=r"index.npz cannot be read; run `deepmim-scale data scan"):
        opened(path)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_member_replaced_after_the_scan(folder: Path, tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    path = write_tar(folder, tmp_path)
    scan(path)
    source = opened(path)
    data = bytearray(path.read_bytes())
    old, new = source.read(5), jpeg(1000)
    place = data.find(old)
    data[place : place + len(old)] = new[: len(old)].ljust(len(old), b"\0")
    path.write_bytes(data)
    with pytest.raises(
        BadImage, match=r"step \d: set.tar:a/10.jpg: .*changed since the scan; run "
    ):
        load(opened(path), "fail", loader)
    # Replaced as the same image of the folder is when it is quarantined there.
    (folder / "train" / "quarantine.txt").write_text("a/10.jpg\tx\n")
    expected = load(opened(folder), "fail", loader)
    (folder / "train" / "quarantine.txt").unlink()
    for one, two in zip(load(opened(path), "replace", loader), expected, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, two.tensors()[name]), name


def with_size(archive: Path, size: int) -> None:
    """Let the only member of a zip claim another size, in both of its headers."""
    data = bytearray(archive.read_bytes())
    struct.pack_into("<I", data, 22, size)
    struct.pack_into("<I", data, data.find(b"PK\1\2") + 24, size)
    archive.write_bytes(data)


@pytest.mark.parametrize("claim", [1000, (1 << 28) + 1, 20_000_000])
def test_a_zip_bomb_is_an_unreadable_image(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", jpeg() + bytes(20_000_000 - len(jpeg()) + 1))
    with_size(path, claim)
    with pytest.raises(UserError, match=r"1 unreadable images: a.jpg; run `deepmim-scale data ver"):
        opened(path)


def test_a_huge_header_is_an_unreadable_image(tmp_path: Path) -> None:
    data = bytearray(jpeg())
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_bytes(tar, "0.jpg", jpeg())
        add_bytes(tar, "1.jpg", bytes(data))
        add_bytes(tar, "2.jpg", b"")
        add_bytes(tar, "3.jpg", b"<html>")
    with pytest.raises(UserError, match=r"3 unreadable images: 1.jpg, 2.jpg, 3.jpg; run"):
        opened(tmp_path / "a.tar")
    assert list(opened(tmp_path / "a.tar", "replace").bad) == [1, 2, 3]


def test_a_parquet_without_images_names_its_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="an extra: parquet")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet has no column of images, but text, label; call it image or "
    ):
        opened(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"image": [jpeg(), None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"1 unreadable images: a-000000001; run"):
        opened(tmp_path / "a.parquet")
    table = pa.table({"image": [jpeg(), jpeg(1)], "label": [0, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a-000000001 has no label, others have; add it"):
        opened(tmp_path / "a.parquet")


class Harm:
    """Its pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path("harm"),)


def test_names_are_never_paths_and_pickles_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(7))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.tar"
    with tarfile.open(path, "w") as tar:
        add_bytes(tar, "c/0.jpg", jpeg())
        add_bytes(tar, "/etc/1.jpg", jpeg(1))
        for name in ("c/0.pyd", "c/0.pickle"):
            add_bytes(tar, name, pickle.dumps(Harm()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"c/{ord(kind)}.jpg")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
        add_bytes(tar, "../2.jpg", jpeg(2))
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as deeper:
            add_bytes(deeper, "x.tar", b"a tar in a tar in a tar is none")
        add_bytes(tar, "deep.tar", inner.getvalue())
    source = opened(path)
    assert [source.name(i) for i in range(len(source))] == ["a.tar:c/0.jpg", "a.tar:etc/1.jpg"]
    assert [source.read(i) for i in range(2)] == [jpeg(), jpeg(1)]
    assert source.notes[0] == "files of other kinds ignored: 2 links, 1 .pyd, 1 .pickle, 1 .tar"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in", "secret.jpg"]


def test_headers_that_ask_for_memory(tmp_path: Path) -> None:
    """A pax header of many gigabytes, and thousands of headers in a row."""
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 39
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match=r"a.tar has a damaged header at byte 0; copy the file"):
        opened(path)
    empty = tarfile.TarInfo("x")
    empty.type = tarfile.XHDTYPE
    path.write_bytes(empty.tobuf(tarfile.GNU_FORMAT) * 4000 + bytes(1024))
    with pytest.raises(UserError, match=r"a.tar has a damaged header at byte 0; copy the file"):
        opened(path)


@pytest.mark.parametrize(
    ("sidecars", "line"),
    [
        ({"0.cls": b"x", "1.cls": b"1"}, r"0.cls holds no label: "),
        ({"0.json": b"[" * 100_000, "1.json": b"{}"}, r"0.json holds no label: "),
        ({"0.cls": b"9" * 30, "1.cls": b"1"}, r"labels go from 1 to 9+; they must lie in \[0, 10"),
        ({"0.cls": b"1"}, r"1.jpg has no label, others have; add it"),
        ({"0.json": b'{"label": "dog"}', "1.cls": b"1"}, r"labels are numbers and words; use one"),
    ],
    ids=["word", "nested", "large", "some", "mixed"],
)
def test_labels_of_webdataset_that_cannot_be(
    tmp_path: Path, sidecars: dict[str, bytes], line: str
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(2):
            add_bytes(tar, f"{i}.jpg", jpeg(i))
        for name, data in sidecars.items():
            add_bytes(tar, name, data)
    with pytest.raises(UserError, match=line) as error:
        opened(tmp_path / "a.tar")
    assert "\n" not in str(error.value)


def test_damaged_pages_are_told(folder: Path, tmp_path: Path) -> None:
    """Flipped bytes of a parquet file: refused, or noticed when they are read."""
    pytest.importorskip("pyarrow", reason="an extra: parquet")
    path = next((write_parquet(folder, tmp_path) / "data").glob("train-00000*"))
    good, expected = path.read_bytes(), opened(path)
    images = [expected.read(i) for i in range(len(expected))]
    refused = 0
    for place in range(0, len(good), 101):
        data = bytearray(good)
        data[place] ^= 0x15
        path.write_bytes(data)
        try:
            opened(path)
        except UserError:
            refused += 1
        for i, image in enumerate(images):  # with the index of the good file
            with contextlib.suppress(OSError):
                assert len(expected.read(i)) == len(image)
    assert refused > 5


def test_mixed_and_misplaced_parts(folder: Path, tmp_path: Path) -> None:
    items = images_of(folder, "train")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_bytes(tar, "train/a/0.jpg", jpeg())
        add_bytes(tar, "extra/0.jpg", jpeg())
    with pytest.raises(UserError, match=r"extra lies beside the folders train; leave it out"):
        opened(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_bytes(tar, "val/a/0.jpg", jpeg())
    with pytest.raises(UserError, match=r"has val but no train"):
        opened(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, _, file in items:
            add_bytes(tar, name, file.read_bytes())
        add_bytes(tar, "0.jpg", jpeg())
    with pytest.raises(
        UserError, match=r"0.jpg lies beside class folders; move it into one, or gi"
    ):
        opened(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_bytes(tar, "readme.txt", json.dumps([zlib.crc32(b"")]).encode())
    with pytest.raises(UserError, match=r"no images in its containers; .* ignored: 1 .txt"):
        opened(tmp_path / "a.tar")


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed in (1, 2, 3):
            add_bytes(tar, "0.jpg", jpeg(seed))
    source = opened(tmp_path / "a.tar")
    assert [source.read(i) for i in range(len(source))] == [jpeg(3)]
    assert source.notes == ("2 images replaced by later ones of the same name",)
