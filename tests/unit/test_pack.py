"""A packed copy: smaller images under the same ids and labels, whatever they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from containers import write_parquet
from PIL import Image

from deepmim_scale.cli import main
from deepmim_scale.data.commands import PackArguments, run_pack
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.source import SPLITS
from deepmim_scale.data.torch_backend import decode_image
from deepmim_scale.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of 60 to 100 px a side, one of them small, one unreadable, one cut off."""
    generator = np.random.default_rng(0)
    root = tmp_path / "images"
    for i in range(33):
        coarse = generator.integers(0, 255, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((100, 60 + i), Image.Resampling.BICUBIC)
        path = root / ("val" if i < 3 else "train") / f"c{i % 11:02}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.resize((20, 24)) if i == 7 else image).save(path)
    (root / "train" / "c08" / "8.jpg").write_bytes(b"")
    cut = root / "train" / "c09" / "9.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    return root


def test_ids_and_labels_stay(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.tar"
    run_pack(PackArguments(dir=str(folder), out=str(out), short_side=32, threads=2))
    for split in SPLITS:
        packed, original = (open_source(str(p), split, "replace") for p in (out, folder))
        assert packed
        assert original
        np.testing.assert_array_equal(packed.labels, original.labels)
        assert packed.classes == original.classes
        for i in range(len(original)):
            path = Path(original.name(i)).name
            if path in ("8.jpg", "9.jpg"):
                assert (packed.read(i), i in packed.bad) == (b"", True)
            elif path == "7.jpg":
                assert packed.read(i) == original.read(i), "small images are copied"
            else:
                assert packed.sizes[i].min() == 32
                assert packed.sizes[i, 1] == round(original.sizes[i, 1] * 32 / original.sizes[i, 0])
                big, small = (decode_image(s.read(i)).mean((0, 1)) for s in (original, packed))
                np.testing.assert_allclose(big, small, atol=2)
        # Read again without its index, the tar gives the same.
        out.with_name("packed.tar.index").rename(tmp_path / "aside")
        again = open_source(str(out), split, "replace")
        assert again
        assert (again.sha, again.classes, list(again.bad)) == (
            packed.sha,
            packed.classes,
            list(packed.bad),
        )
        (tmp_path / "aside").rename(out.with_name("packed.tar.index"))


def test_numbered_classes_keep_their_order(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="an extra: parquet")
    data = write_parquet(folder, tmp_path / "parquet")
    out = tmp_path / "packed.tar"
    run_pack(PackArguments(dir=str(data), out=str(out), short_side=32))
    packed, original = (open_source(str(p), "train", "replace") for p in (out, data))
    assert packed
    assert original
    np.testing.assert_array_equal(packed.labels, original.labels)
    assert packed.name(5) == f"packed.tar:{packed.labels[5]:02}/00000005.jpg"


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    for name, rule in (("a.zip", "must end in .tar"), ("there.tar", "exists; name a new file")):
        (tmp_path / "there.tar").touch()
        with pytest.raises(UserError, match=rule):
            run_pack(PackArguments(dir=str(folder), out=str(tmp_path / name)))
    with pytest.raises(SystemExit) as stop:
        main(["data", "pack", str(folder), str(tmp_path / "b.tar"), "--short-side", "3"])
    assert stop.value.code == 2
    assert not list(tmp_path.glob("*partial*"))
