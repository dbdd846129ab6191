"""What the tests of launched runs share."""

from __future__ import annotations

import pytest

from deepmim_scale.data.samples import write_samples


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample set with two validation images of each class, which is enough here."""
    folder = tmp_path_factory.mktemp("data") / "samples"
    write_samples(folder)
    for kind in (folder / "val").iterdir():
        for path in sorted(kind.iterdir())[2:]:
            path.unlink()
    return str(folder)
