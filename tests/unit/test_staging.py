"""--stage-to: a copy on the node's disk with the ids and bits of the original, made once."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from containers import write_parquet, write_tar
from PIL import Image

from deepmim_scale.data import staging
from deepmim_scale.data.container_source import ContainerSource
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.ranges import RangeReader
from deepmim_scale.data.source import Source
from deepmim_scale.data.staging import stage_source
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.train.prepare import prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / ("val" if i < 4 else "train") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (9 + i % 3, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def opened(path: Path) -> Source:
    source = open_source(str(path), "train", "replace")
    assert source is not None
    return source


def stage(source: Source, to: Path) -> ContainerSource:
    return stage_source(source, "train", str(to), 2)


def assert_equal(staged: Source, source: Source) -> None:
    assert (staged.sha, staged.classes, staged.bad) == (source.sha, source.classes, source.bad)
    np.testing.assert_array_equal(staged.labels, source.labels)
    np.testing.assert_array_equal(staged.sizes, source.sizes)
    for i in set(range(len(source))) - set(source.bad):
        assert staged.read(i) == source.read(i)
        assert source.name(i) in staged.name(i)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_copy_is_the_original(folder: Path, tmp_path: Path, kind: str) -> None:
    (folder / "train" / "a" / "06.png").write_bytes(b"")
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="an extra: parquet")
        path = write_parquet(folder, tmp_path / "parquet")
    else:
        path = folder if kind == "folder" else write_tar(folder, tmp_path)
    source = opened(path)
    assert len(source.bad) == 1
    assert_equal(stage(source, tmp_path / "node"), source)


def test_it_is_made_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, to = opened(folder), tmp_path / "node"
    stage(source, to)
    assert capsys.readouterr().out.startswith("staging 36 images, 2 classes in ")
    expected = [source.read(i) for i in range(36)]
    shutil.move(folder / "train", tmp_path / "away")  # nothing is read from there again
    staged = stage(source, to)
    assert capsys.readouterr().out == ""
    assert [staged.read(i) for i in range(36)] == expected
    assert staged.notes[-1].startswith("read from the copy in ")


@pytest.mark.parametrize("lost", [0, 500])
def test_an_interrupted_copy_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    monkeypatch.setattr(staging, "BATCH", 4)
    source, to, read = opened(folder), tmp_path / "node", []
    honest = type(source).read

    def stopping(self: Source, sample_id: int) -> bytes:
        if sample_id == 21 and not read.count(-1):
            read.append(-1)
            raise KeyboardInterrupt
        read.append(sample_id)
        return honest(self, sample_id)  # type: ignore[arg-type]

    monkeypatch.setattr(type(source), "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        stage(source, to)
    (images,) = to.rglob("images")
    with images.open("r+b") as file:  # what a machine that went down may have lost
        file.truncate(images.stat().st_size - lost)
    read[:] = [-1]
    staged = stage(source, to)
    assert min(read[1:]) == 20 if not lost else 15 < min(read[1:]) < 20
    monkeypatch.undo()
    assert_equal(staged, source)


def test_what_cannot_be_copied_stops_by_name(folder: Path, tmp_path: Path) -> None:
    source = opened(folder)
    (folder / "train" / "a" / "20.png").unlink()
    with pytest.raises(RunFailure, match=r"a/20.png: No such file or directory; run `deepmim-sc"):
        stage(source, tmp_path / "node")


def test_space_is_checked_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage(0, 0, 1 << 29))
    with pytest.raises(UserError, match=r"^stage_to=\S+: \S+ needs 0.0 GB more and 1 GB to spare"):
        stage(opened(folder), tmp_path / "node")


def test_a_copy_that_changed_is_noticed(folder: Path, tmp_path: Path) -> None:
    source, to = opened(folder), tmp_path / "node"
    stage(source, to)
    (images,) = to.rglob("images")
    data = bytearray(images.read_bytes())
    data[5] ^= 1
    images.write_bytes(data)
    staged = stage(source, to)
    assert isinstance(staged.reader, RangeReader)
    with pytest.raises(OSError, match="changed since the scan"):
        staged.read(0)
    images.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"images has changed; remove "):
        stage(source, to)


def _stage_in_process(folder: str, to: str) -> None:
    stage(opened(Path(folder)), Path(to))


def test_processes_of_a_node_make_one_copy(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "node"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_stage_in_process, args=(str(folder), str(to))) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert_equal(stage(opened(folder), to), opened(folder))


def test_runs_read_from_the_copy(folder: Path, tmp_path: Path) -> None:
    from deepmim_scale.presets import load_preset

    config = load_preset("debug").replace(
        data=str(folder), stage_to=str(tmp_path / "node"), output=str(tmp_path / "run")
    )
    prepared = prepare(config)
    for source in (prepared.train, prepared.validation):
        assert source is not None
        assert source.notes[-1].startswith("read from the copy in ")
