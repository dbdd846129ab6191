"""What unit tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepmim_scale.data.samples import PHOTOS, write_samples


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 200 real JPEGs: every fourth training region of the sample photographs."""
    base = tmp_path_factory.mktemp("photographs")
    write_samples(base / "samples")
    flat = base / "flat"
    flat.mkdir()
    files = [path for name in PHOTOS for path in (base / "samples/train" / name).iterdir()]
    for path in sorted(files)[::4]:
        shutil.copy(path, flat / f"{path.parent.name}_{path.name}")
    assert len(list(flat.iterdir())) == 200
    return flat
