"""Image folders: layouts, what is refused, stale manifests, and the commands on top."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepmim_scale.data.commands import ScanArguments, run_scan
from deepmim_scale.data.folder_source import find_split, open_folder
from deepmim_scale.data.manifest import scan_folder
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.source import good_ids
from deepmim_scale.data.torch_backend import decode_image
from deepmim_scale.errors import UserError


def write(path: Path, height: int = 6, width: int = 9, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), 77).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, one of them empty."""
    root = tmp_path / "data"
    write(root / "ant" / "b.jpg", 4, 5)
    write(root / "ant" / "deep" / "a.PNG", 7, 8)
    write(root / "cat" / "c.jpeg", 9, 3)
    (root / "bee").mkdir()
    return root


def test_class_folders(folder: Path) -> None:
    manifest = scan_folder(folder)
    assert manifest.names == ("ant/b.jpg", "ant/deep/a.PNG", "cat/c.jpeg")
    assert manifest.classes == ("ant", "bee", "cat")
    assert manifest.labels.tolist() == [0, 0, 2]
    assert manifest.sizes.tolist() == [[4, 5], [7, 8], [9, 3]]
    assert manifest.notes == ("empty class folders (they keep their numbers): bee",)
    assert "3 images, 3 classes" in manifest.describe()


def test_flat_folder(tmp_path: Path) -> None:
    write(tmp_path / "b.png")
    write(tmp_path / "a.webp")
    manifest = scan_folder(tmp_path)
    assert manifest.names == ("a.webp", "b.png")
    assert manifest.classes == (".",)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (50, 20)).save(tmp_path / "a.jpg", exif=exif)
    manifest = scan_folder(tmp_path)
    assert manifest.sizes.tolist() == [[20, 50]]


def test_images_beside_class_folders(folder: Path) -> None:
    write(folder / "stray.jpg")
    with pytest.raises(UserError, match=r"1 images \(e.g. stray.jpg\) lie beside class folders"):
        scan_folder(folder)


def test_other_files_are_counted(folder: Path) -> None:
    (folder / "cat" / "moving.gif").write_bytes(b"GIF89a")
    (folder / "readme").write_text("x")
    assert "files of other kinds ignored: 1 .gif, 1 no extension" in scan_folder(folder).notes


def test_links_that_lead_nowhere_or_back(folder: Path) -> None:
    (folder / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "cat" / "self.png").symlink_to("self.png")
    (folder / "ant" / "deep" / "up").symlink_to("../..")
    (folder / "dog").symlink_to("cat")  # follows as any folder
    manifest = scan_folder(folder)
    assert manifest.names == ("ant/b.jpg", "ant/deep/a.PNG", "cat/c.jpeg", "dog/c.jpeg")
    assert manifest.notes[0] == (
        "5 broken or circular links left out: ant/deep/up, cat/gone.jpg, cat/self.png and 2 more"
    )


def test_only_broken_links(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"no images; found 0 folders and 1 broken .*: a.jpg;"):
        scan_folder(tmp_path)


def test_names_that_are_no_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(folder / "cat" / "c.jpeg", os.fsencode(folder / "cat") + b"/c\xff.jpg")
    scanned = scan_folder(folder)
    assert os.fsencode(scanned.names[2]) == b"cat/c\xff.jpg"
    run_scan(ScanArguments(dir=str(folder)))
    saved = open_folder(folder).manifest
    assert (saved.names, saved.sha) == (scanned.names, scanned.sha)
    assert decode_image(open_folder(folder).read(2)).shape == (9, 3, 3)
    (folder / "cat" / os.fsdecode(b"\xfe.jpg")).write_bytes(b"")
    run_scan(ScanArguments(dir=str(folder)))
    with pytest.raises(UserError, match=r'unreadable images: "cat/\\udcfe.jpg"; run') as error:
        open_folder(folder)
    str(error.value).encode()


def test_a_save_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **_: Any) -> None:
        path.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(folder.iterdir())
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        scan_folder(folder).save(folder / "manifest.npz")
    assert sorted(folder.iterdir()) == before


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found nothing .* exists"):
        find_split(str(tmp_path / "absent" / "deeper"), "train")
    with pytest.raises(UserError, match="found a file"):
        find_split(str(write(tmp_path / "file.jpg")), "train")
    empty = tmp_path / "empty"
    (empty / "ant").mkdir(parents=True)
    (empty / "ant" / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"no images; found 1 folders and .*1 \.gif"):
        scan_folder(empty)


def test_validation_must_be_called_val(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ant" / "a.jpg")
    write(tmp_path / "validation" / "ant" / "a.jpg")
    with pytest.raises(UserError, match=r"^data=\S+: has a folder validation; rename it to val$"):
        open_source(str(tmp_path), "train")
    (tmp_path / "validation").rename(tmp_path / "val")
    assert open_source(str(tmp_path), "val") is not None


def test_splits(tmp_path: Path) -> None:
    write(tmp_path / "mae" / "train" / "ant" / "a.jpg")
    assert find_split(str(tmp_path / "mae"), "train") == tmp_path / "mae" / "train"
    assert find_split(str(tmp_path / "mae"), "val") is None
    (tmp_path / "mae" / "val").mkdir()
    assert find_split(str(tmp_path / "mae"), "val") == tmp_path / "mae" / "val"
    plain = tmp_path / "mae" / "train"
    assert find_split(str(plain), "train") == plain
    shutil.rmtree(plain)
    with pytest.raises(UserError, match="has a folder val but no train"):
        find_split(str(tmp_path / "mae"), "train")


def test_saved_manifest_equals_the_scan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scanned = scan_folder(folder)
    run_scan(ScanArguments(dir=str(folder)))
    assert "3 images, 3 classes" in capsys.readouterr().out
    saved = open_folder(folder).manifest
    assert (saved.names, saved.classes, saved.sha) == (scanned.names, scanned.classes, scanned.sha)
    for name in ("labels", "sizes", "num_bytes"):
        np.testing.assert_array_equal(getattr(saved, name), getattr(scanned, name))


@pytest.mark.parametrize("change", ["add", "remove", "resize"])
def test_stale_manifest_is_refused(folder: Path, change: str) -> None:
    run_scan(ScanArguments(dir=str(folder)))
    if change == "add":
        write(folder / "cat" / "new.jpg")
    elif change == "remove":
        (folder / "ant" / "b.jpg").unlink()
    else:
        write(folder / "ant" / "b.jpg", 300, 400)
    with pytest.raises(UserError, match=r"stale .* run `deepmim-scale data scan"):
        open_folder(folder)


def test_broken_manifest_is_one_line(folder: Path) -> None:
    (folder / "manifest.npz").write_bytes(b"PK half a file")
    with pytest.raises(UserError, match=r"cannot be read; run `deepmim-scale data scan"):
        open_folder(folder)


def test_flipped_bits_are_named(folder: Path) -> None:
    """Whatever the damage makes of the file, it is one line, or it changed nothing that is read."""
    run_scan(ScanArguments(dir=str(folder)))
    saved = folder / "manifest.npz"
    data = saved.read_bytes()
    expected = open_folder(folder).manifest
    lines: list[str] = []
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        saved.write_bytes(damaged)
        try:
            found = open_folder(folder).manifest
        except UserError as error:
            lines.append(str(error))
        else:
            assert (found.names, found.classes) == (expected.names, expected.classes)
            np.testing.assert_array_equal(found.sizes, expected.sizes)
            np.testing.assert_array_equal(found.labels, expected.labels)
    assert len(lines) > len(data) // 7 // 2
    again = "run `deepmim-scale data scan"
    assert all(f"{saved} " in line and again in line and "\n" not in line for line in lines)


def test_folders_must_be_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"is not writable; give --cache DIR"):
        run_scan(ScanArguments(dir=str(folder)))


def test_unreadable_headers_fail_or_are_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cat" / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 unreadable images: cat/bad.jpg; run .* data verify"):
        open_folder(folder)
    source = open_folder(folder, on_bad="replace")
    assert source.manifest.names[2] == "cat/bad.jpg"
    assert list(source.bad) == [2]
    assert source.notes[-1] == "1 unreadable images are not used: cat/bad.jpg"
    run_scan(ScanArguments(dir=str(folder)))
    assert "1 headers cannot be read" in capsys.readouterr().out
    assert open_folder(folder, on_bad="replace").bad == source.bad


def test_quarantine_is_honoured(folder: Path) -> None:
    (folder / "cat" / "bad.jpg").write_bytes(b"")
    (folder / "quarantine.txt").write_text("cat/bad.jpg\tunreadable: empty\nant/b.jpg\tdamaged\n")
    source = open_folder(folder)
    assert source.bad == {0: "damaged", 2: "unreadable: empty"}
    assert good_ids(source).tolist() == [1, 3]
    assert source.labels.tolist() == [0, 0, 2, 2]
    assert source.sha == scan_folder(folder).sha
    assert source.notes[-1].startswith("2 quarantined images are not used (")
    everything = "".join(f"{name}\tbad\n" for name in source.manifest.names)
    (folder / "quarantine.txt").write_text(everything)
    with pytest.raises(UserError, match=r"^data=.*: all 4 images are bad; see .*quarantine\.txt"):
        open_folder(folder)
