"""The sample set: deterministic, complete or absent, validation parts never trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepmim_scale.data import samples
from deepmim_scale.data.commands import (
    DigitsArguments,
    SamplesArguments,
    run_digits,
    run_samples,
)
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.data.samples import load_digits_probe, write_samples
from deepmim_scale.errors import UserError

skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samples") / "set"
    assert write_samples(root)
    return root


def digest(root: Path) -> list[tuple[str, str]]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [
        (str(path.relative_to(root)), hashlib.sha1(path.read_bytes()).hexdigest()) for path in files
    ]


def test_layout(folder: Path) -> None:
    train, val = open_folder(folder / "train"), open_folder(folder / "val")
    assert set(train.classes) == set(val.classes) == {*samples.PHOTOS, "digits"}
    assert len(train) == 10 * samples.TRAIN_REGIONS + 899
    assert len(val) == 10 * samples.VAL_REGIONS + 898
    text = (folder / "ATTRIBUTION.txt").read_text()
    assert all(f"{name}: " in text for name in train.classes)
    assert not list(folder.parent.glob(".*"))


def test_same_bytes_again_and_second_call_keeps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_samples(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(folder)
    run_samples(SamplesArguments(out=str(folder)))
    assert "is there already" in capsys.readouterr().out


def test_place_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match=r"^out=/proc/nowhere/\S+: cannot be written"):
        write_samples("/proc/nowhere/samples")


def test_half_written_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samples, "_digits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_samples(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write_samples(tmp_path / "out")


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        write_samples(tmp_path)


def test_training_regions_end_before_the_right_quarter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a picture whose red tells the column, no region crosses the border."""
    columns = np.linspace(0, 255, 800).astype(np.uint8)
    ramp = np.broadcast_to(columns[None, :, None], (400, 800, 3)).copy()
    monkeypatch.setattr(skimage_data, "coffee", lambda: ramp)
    samples._write_photo(tmp_path, 4, "coffee")
    border = columns[600]
    for path in (tmp_path / "train" / "coffee").iterdir():
        assert np.asarray(Image.open(path)).max() <= border + 4, path  # JPEG rounds
    for path in (tmp_path / "val" / "coffee").iterdir():
        assert np.asarray(Image.open(path)).min() >= border - 4, path


def test_probe_is_the_held_out_half(folder: Path) -> None:
    images, labels = load_digits_probe()
    assert images.shape == (898, 3, 32, 32)
    assert labels.shape == (898,)
    paths = sorted((folder / "val" / "digits").iterdir())
    for place in (0, 1, 400, 897):
        np.testing.assert_array_equal(images[place, 0], np.asarray(Image.open(paths[place])))
    trained = {path.name for path in (folder / "train" / "digits").iterdir()}
    assert trained.isdisjoint(path.name for path in paths)


def test_digits_by_class(tmp_path: Path) -> None:
    """The sample set's digits in the same parts, by their labels; a second call adds nothing."""
    for _ in range(2):
        run_digits(DigitsArguments(out=str(tmp_path)))
    train, val = (sorted((tmp_path / part).rglob("*.png")) for part in ("train", "val"))
    assert (len(train), len(val)) == (899, 898)
    assert {path.parent.name for path in train} == set("0123456789")
    pixels, labels = load_digits_probe()
    first = next(path for path in val if path.stem == "0000")
    assert first.parent.name == str(labels[0])
    assert np.array_equal(np.asarray(Image.open(first)), pixels[0, 0])
