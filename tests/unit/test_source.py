"""A new kind of source is one class and one registration; the rest does not know the difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from deepmim_scale.batch import Batch
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data import open_source as sources
from deepmim_scale.data.backend import BadImage
from deepmim_scale.data.choose_backend import build_backend
from deepmim_scale.data.open_source import SourceKind, open_source, register_source
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import OnBad, Source, Split, good_ids
from deepmim_scale.data.step_loader import Share, Span, build_step_loader, iter_validation

Loader = Literal["torch", "dali"]
CONFIG = RunConfig(
    model=ModelConfig(method="mae", img_size=16, patch_size=4), microbatch_size=4, loader_threads=2
)


@dataclass(frozen=True, eq=False)
class MemorySource:
    """The files of a folder, kept in memory: all that a new kind of source has to bring."""

    location: str
    files: list[bytes]
    labels: np.ndarray
    classes: tuple[str, ...]
    sizes: np.ndarray
    sha: str = "memory"
    bad: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, sample_id: int) -> str:
        return f"{self.location}[{sample_id}]"

    def read(self, sample_id: int) -> bytes:
        return self.files[sample_id]

    def describe(self) -> str:
        return f"{len(self)} images in memory"


def open_memory(path: str, split: Split, on_bad: OnBad, cache: str) -> MemorySource | None:
    folder = open_source(path.removeprefix("memory:"), split, on_bad, cache)
    if folder is None:
        return None
    files = [folder.read(i) for i in range(len(folder))]
    return MemorySource(path, files, folder.labels, folder.classes, folder.sizes, bad=folder.bad)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two classes in train and in val, with one quarantined image in each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 22), ("val", 9)):
        for i in range(count):
            pixels = generator.integers(0, 255, (17 + i % 3, 24, 3), dtype=np.uint8)
            path = tmp_path / split / "ab"[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        (tmp_path / split / "quarantine.txt").write_text("b/03.jpg\tdamaged\n")
    return str(tmp_path)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "KINDS", list(sources.KINDS))
    register_source(SourceKind(lambda path: path.startswith("memory:"), open_memory))


def opened(path: str, split: Split = "train") -> Source:
    source = open_source(path, split)
    assert source is not None
    return source


def load(source: Source, loader: Loader = "torch") -> Iterator[Batch]:
    plan = SamplePlan(len(source), 3, 8)
    backend, _ = build_backend(CONFIG, source, 4, torch.device("cpu"), loader)
    share, span = Share(num_microbatches=2), Span(1, 5)
    for batches in build_step_loader(CONFIG, source, plan, share, span, backend=backend):
        yield from batches


def assert_equal(first: Iterator[Batch], second: Iterator[Batch]) -> None:
    count = 0
    for one, two in zip(first, second, strict=True):
        for (name, a), (other, b) in zip(one.tensors().items(), two.tensors().items(), strict=True):
            assert name == other
            assert torch.equal(a, b), name
        count += 1
    assert count


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_memory_feeds_as_the_folder_does(data: str, loader: Loader) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    memory = opened(f"memory:{data}")
    assert isinstance(memory, MemorySource)
    assert_equal(load(memory, loader), load(opened(data), loader))


@pytest.mark.usefixtures("registered")
def test_memory_validates_as_the_folder_does(data: str) -> None:
    memory, folder = opened(f"memory:{data}", "val"), opened(data, "val")
    assert_equal(iter_validation(CONFIG, memory), iter_validation(CONFIG, folder))
    assert len(good_ids(memory)) == 8


@pytest.mark.usefixtures("registered")
def test_a_bad_sample_is_called_by_the_sources_name(data: str) -> None:
    memory = opened(f"memory:{data}")
    assert isinstance(memory, MemorySource)
    memory.files[:] = [b"no image"] * len(memory)
    with pytest.raises(BadImage, match=r"step 1: memory:\S+\[\d+\]: not an image; run"):
        list(load(memory))


def test_without_a_kind_of_its_own_a_path_is_a_folder(data: str) -> None:
    assert opened(data).location == f"{data}/train"
    assert open_source(f"{data}/train", "val") is None
