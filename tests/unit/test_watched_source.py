"""A run says which image it waited for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepmim_scale.data.folder_source import FolderSource, open_folder
from deepmim_scale.data.source import ReadsAhead
from deepmim_scale.data.watched_source import WatchedSource


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    generator = np.random.default_rng(0)
    for i in range(3):
        pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return open_folder(tmp_path)


def test_the_slowest_read_is_named(
    source: FolderSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = WatchedSource(source)
    honest: Callable[[FolderSource, int], bytes] = FolderSource.read

    def slow(self: FolderSource, sample_id: int) -> bytes:
        if sample_id == 1:
            time.sleep(0.05)
        if sample_id == 2:
            raise OSError("gone")
        return honest(self, sample_id)

    monkeypatch.setattr(FolderSource, "read", slow)
    assert watched.read(0) == honest(source, 0)
    watched.read(1)
    with pytest.raises(OSError, match="gone"):
        watched.read(2)
    row = watched.report(7, wait_seconds=9.0)
    assert row["slowest_read"].endswith("1.png")
    assert row["slowest_read_ms"] >= 50
    assert capsys.readouterr().err == ""
    watched.read(0)
    row = watched.report(8, wait_seconds=31.0)
    assert row["slowest_read"].endswith("0.png"), "since the last report"
    line = capsys.readouterr().err
    assert line.startswith("step 8: waited 31.0 s for images; slowest read 0.0 s: ")
    assert line.endswith("0.png\n")
    assert watched.report(9, wait_seconds=11.0) == {}
    assert "nothing was read" in capsys.readouterr().err


def test_it_stands_for_its_source(source: FolderSource) -> None:
    watched = WatchedSource(source)
    assert (len(watched), watched.sha, watched.classes) == (3, source.sha, source.classes)
    assert watched.name(1) == source.name(1)
    assert not isinstance(watched, ReadsAhead), "a folder does not read ahead"
    assert json.dumps(watched.report(1, 0.0)) == "{}"
