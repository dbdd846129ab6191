"""The same images in any container give the batches of the folder, to the bit."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from containers import WRITERS, add_bytes, images_of, pack, write_parquet, write_tar, write_zip
from PIL import Image

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data.choose_backend import build_backend
from deepmim_scale.data.commands import ScanArguments, VerifyArguments, run_scan, run_verify
from deepmim_scale.data.container_source import ContainerSource
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.samples import write_samples
from deepmim_scale.data.source import SPLITS, Source, Split, good_ids
from deepmim_scale.data.step_loader import Share, Span, build_step_loader, iter_validation
from deepmim_scale.errors import UserError

Loader = Literal["torch", "dali"]
BATCH = 16
MODEL = ModelConfig(method="mae", img_size=16, patch_size=4)
CONFIG = RunConfig(model=MODEL, microbatch_size=4, loader_threads=2)


def write_images(folder: Path, train: int = 50, val: int = 14, side: int = 20) -> Path:
    """Classes and names whose order depends on how it is made, as JPEG and PNG."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            pixels = generator.integers(0, 255, (side + i % 3, side + 4, 3), dtype=np.uint8)
            name = ("x-y/{}.jpg", "x/{}.jpg", "{}.png")[i // 3 % 3].format(i)
            path = folder / split / ("a", "a-b", "b")[i % 3] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("pyarrow", reason="an extra: parquet")
    return pack(folder, tmp_path_factory.mktemp("packed"))


def opened(path: Path, split: Split = "train") -> Source:
    source = open_source(str(path), split)
    assert source is not None
    return source


def digests(
    source: Source, loader: Loader, replicas: int, start: int = 0, epochs: int = 3, rank: int = -1
) -> list[str]:
    """SHA-256 of every micro-batch from step `start` on; of all replicas, or of one."""
    plan = SamplePlan(len(source), 5, BATCH)
    steps = epochs * plan.steps_per_epoch - start
    each = BATCH // replicas
    backend, _ = build_backend(CONFIG, source, each, torch.device("cpu"), loader)
    loaders = [
        build_step_loader(
            CONFIG, source, plan, Share(number, replicas, 1), Span(start, steps), backend=backend
        )
        for number in (range(replicas) if rank < 0 else [rank])
    ]
    found = []
    for batches in zip(*loaders, strict=True):
        for (batch,) in batches:
            tensors = batch.tensors().values()
            found.append(hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest())
    return found


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_batches_are_those_of_the_folder(
    folder: Path, packed: dict[str, Path], loader: Loader
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    for replicas in (1, 2, 4):
        expected = digests(opened(folder), loader, replicas)
        assert len(set(expected)) == len(expected) == 9 * replicas
        for kind, path in packed.items():
            source = opened(path)
            assert digests(source, loader, replicas) == expected, kind
            resumed = digests(source, loader, replicas, start=4)
            assert resumed == expected[4 * replicas :], kind


def test_labels_sizes_and_validation_are_those_of_the_folder(
    folder: Path, packed: dict[str, Path]
) -> None:
    for split in SPLITS:
        expected = opened(folder, split)
        for kind, path in packed.items():
            source = opened(path, split)
            assert source.labels.dtype == source.sizes.dtype == np.int32
            np.testing.assert_array_equal(source.labels, expected.labels, kind)
            np.testing.assert_array_equal(source.sizes, expected.sizes, kind)
            if kind in ("tar", "zip", "ilsvrc"):  # the others have lost the classes' names
                assert (source.sha, source.classes) == (expected.sha, expected.classes), kind
            batches = list(iter_validation(CONFIG, source))
            for one, two in zip(batches, iter_validation(CONFIG, expected), strict=True):
                assert torch.equal(one.images, two.images), kind


@pytest.mark.parametrize("kind", WRITERS)
def test_an_index_is_the_scan(
    packed: dict[str, Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(packed[kind].parent.rglob("*"))
    run_scan(ScanArguments(dir=str(packed[kind]), cache=str(tmp_path)))
    assert "50 images, 3 classes in" in capsys.readouterr().out
    assert sorted(packed[kind].parent.rglob("*")) == before, "the cache takes all that is written"
    for split in SPLITS:
        scanned = open_source(str(packed[kind]), split)
        saved = open_source(str(packed[kind]), split, cache=str(tmp_path))
        assert scanned
        assert saved
        assert (saved.sha, saved.classes, len(saved)) == (
            scanned.sha,
            scanned.classes,
            len(scanned),
        )
        for i in range(len(saved)):
            assert (saved.name(i), saved.read(i)) == (scanned.name(i), scanned.read(i))


def test_without_a_cache_the_index_lies_beside(folder: Path, tmp_path: Path) -> None:
    path = write_tar(folder, tmp_path)
    run_scan(ScanArguments(dir=str(path)))
    saved = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    index = ["set.tar.index/train/index.npz", "set.tar.index/val/index.npz"]
    assert sorted(saved) == ["set.tar", *index]
    write_tar(folder / "train" / "a", tmp_path)
    with pytest.raises(
        UserError, match=r"index.npz is stale \(set.tar changed\); run `deepmim-sca"
    ):
        open_source(str(path), "train")
    run_scan(ScanArguments(dir=str(path)))
    assert len(opened(path)) == 17
    assert open_source(str(path), "val") is None


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"compression": "gzip", "use_dictionary": False},
        {"compression": "snappy", "data_page_size": 3000},
        {"compression": "none", "data_page_version": "2.0", "dictionary_pagesize_limit": 5000},
    ],
    ids=str,
)
def test_parquet_as_writers_differ(folder: Path, tmp_path: Path, options: dict[str, str]) -> None:
    pytest.importorskip("pyarrow", reason="an extra: parquet")
    source = opened(write_parquet(folder, tmp_path, **options))
    expected = opened(folder)
    assert [source.read(i) for i in range(50)] == [expected.read(i) for i in range(50)]


def test_parquet_without_paths_goes_by_rows(folder: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="an extra: parquet")
    from pyarrow import parquet

    files = [file.read_bytes() for _, _, file in images_of(folder, "train")]
    parquet.write_table(pa.table({"image": files, "fine": ["x"] * 50}), tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet")
    assert source.classes == (".",)
    assert [source.read(i) for i in range(50)] == files
    assert source.name(7) == "a.parquet:a-000000007"


def test_ilsvrc_validation_takes_its_labels_from_the_kit(folder: Path, tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    items = sorted(images_of(folder, "train"))[:6]
    wnids = ["n03", "n01", "n02"]
    truth = [1, 2, 3, 3, 2, 1]
    kit = [("ILSVRC2012_ID", "<i4"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(i, wnid, "w") for i, wnid in enumerate(wnids, start=1)], kit)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add_bytes(tar, "kit/data/meta.mat", buffer.getvalue())
        text = "".join(f"{number}\n" for number in truth).encode()
        add_bytes(tar, "kit/data/ILSVRC2012_validation_ground_truth.txt", text)
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in wnids:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                add_bytes(tar, f"{wnid}_1.JPEG", items[0][2].read_bytes())
            add_bytes(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for i, (_, _, file) in enumerate(items, start=1):
            add_bytes(tar, f"ILSVRC2012_val_{i:08}.JPEG", file.read_bytes())
    val = opened(tmp_path, "val")
    assert val.classes == opened(tmp_path, "train").classes == ("n01", "n02", "n03")
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [val.name(i)[-16:-5] for i in range(6)] == [f"al_{i:08}" for i in (2, 5, 3, 4, 1, 6)]
    # Or from a file, as Kaggle has one.
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kit.tar.gz")
    lines = [f"ILSVRC2012_val_{i:08},{wnids[n - 1]} 1 2 3 4\n" for i, n in enumerate(truth, 1)]
    (tmp_path / "labels.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    for labels in ("kit.tar.gz", "labels.csv"):
        cache = str(tmp_path / "cache" / labels)
        run_scan(ScanArguments(dir=str(tmp_path), cache=cache, labels=str(tmp_path / labels)))
        again = open_source(str(tmp_path), "val", cache=cache)
        assert again
        assert (again.sha, again.labels.tolist()) == (val.sha, val.labels.tolist())
    (tmp_path / "labels.csv").write_text("".join(lines[1:]))
    with pytest.raises(UserError, match=r"have no class for ILSVRC2012_val_00000001.JPEG of "):
        run_scan(ScanArguments(dir=str(tmp_path), labels=str(tmp_path / "labels.csv")))


def test_quarantine_of_containers(folder: Path, tmp_path: Path) -> None:
    path = write_zip(folder, tmp_path, zipfile.ZIP_STORED)
    source = opened(path)
    data = bytearray(path.read_bytes())
    place = data.find(source.read(3))
    data[place + 300 : place + 330] = bytes(30)  # both ends stay
    path.write_bytes(data)
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit):
        run_verify(VerifyArguments(dir=str(path), report=str(report)))
    splits = json.loads(report.read_text())
    assert [split["images"] for split in splits] == [50, 14]
    (finding,) = splits[0]["bad"]
    assert source.name(3).endswith(finding["file"])
    checked = opened(path)
    assert (list(checked.bad), checked.sha) == ([3], source.sha)
    assert len(good_ids(checked)) == 49


def test_what_is_read_next_is_announced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch is being decoded, the next one is on its way, and no more."""
    source = opened(write_tar(folder, tmp_path))
    assert isinstance(source, ContainerSource)
    announced: list[int] = []
    places = {int(entry["offset"]): i for i, entry in enumerate(source.index.entries)}

    def note(_: int, offset: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            assert source.index.entries["stored"][places[offset]] == size
            announced.append(places[offset])

    monkeypatch.setattr(os, "posix_fadvise", note)
    plan = SamplePlan(50, 5, BATCH)
    steps = build_step_loader(CONFIG, source, plan, Share(), Span(0, 6))
    planned = np.concatenate([plan.sample_ids(step) for step in range(6)]).tolist()
    for i, (batch,) in enumerate(steps):
        taken = (i + 1) * BATCH
        assert planned[:taken][-BATCH:] == batch.sample_ids.tolist()
        assert planned[: len(announced)] == announced
        assert taken <= len(announced) <= taken + 3 * BATCH
    assert announced == planned


# A process of its own per rank: CODE FOLDERS-OF-TESTS LOADER REPLICAS RANK PATH...
PROCESS = """
import sys, json
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_containers as there
loader, replicas, rank = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
seen = []
for path in sys.argv[6:]:
    source = there.opened(there.Path(path))
    found = there.digests(source, loader, replicas, 0, 3, rank)
    assert found[7:] == there.digests(source, loader, replicas, 7, 3, rank), path
    seen.append(found)
assert len(set(seen[0])) == len(seen[0])
print(json.dumps([len(seen[0]), [found == seen[0] for found in seen]]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("images", ["samples", "3000"])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_processes_see_what_the_folder_gives(tmp_path: Path, images: str, loader: str) -> None:
    """Three epochs and their resumption, on 1, 2 and 4 processes, from a folder and five others."""
    folder = tmp_path / "images"
    if images == "samples":
        write_samples(folder)
    else:
        write_images(folder, train=3000, val=30, side=120)
    paths = {"folder": folder, **pack(folder, tmp_path / "packed")}
    for path in paths.values():
        run_scan(ScanArguments(dir=str(path)))
    here = Path(__file__)
    for replicas in (1, 2, 4):
        command = [sys.executable, "-c", PROCESS, str(here.parent), str(here.parents[1]), loader]
        ranks = [
            subprocess.Popen(
                [*command, str(replicas), str(rank), *map(str, paths.values())],
                stdout=subprocess.PIPE,
            )
            for rank in range(replicas)
        ]
        for rank in ranks:
            count, equal = json.loads(rank.communicate()[0])
            assert equal == [True] * len(paths), dict(zip(paths, equal, strict=True))
            print(f"{images}, {loader}, {replicas} processes: {count} steps, {len(equal)} sources")
