"""Image folders: layouts, what is refused, stale manifests, and the commands on top."""

import errno
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from deepmim_scale.data.commands import ScanArgs, run_scan
from deepmim_scale.data.manifest import find_split, open_manifest, scan_folder
from deepmim_scale.data.torch_backend import read_image
from deepmim_scale.errors import UserError


def write(path, height=6, width=9, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), 77).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three classes, one of them empty."""
    root = tmp_path / "data"
    write(root / "ant" / "b.jpg", 4, 5)
    write(root / "ant" / "deep" / "a.PNG", 7, 8)
    write(root / "cat" / "c.jpeg", 9, 3)
    (root / "bee").mkdir()
    return root


def test_class_folders(folder):
    manifest = scan_folder(folder)
    assert manifest.names == ("ant/b.jpg", "ant/deep/a.PNG", "cat/c.jpeg")
    assert manifest.classes == ("ant", "bee", "cat")
    assert manifest.labels.tolist() == [0, 0, 2]
    assert manifest.heights.tolist() == [4, 7, 9]
    assert manifest.widths.tolist() == [5, 8, 3]
    assert manifest.notes == ("empty class folders (they keep their numbers): bee",)
    assert "3 images, 3 classes" in manifest.describe()


def test_flat_folder(tmp_path):
    write(tmp_path / "b.png")
    write(tmp_path / "a.webp")
    manifest = scan_folder(tmp_path)
    assert manifest.names == ("a.webp", "b.png")
    assert manifest.classes == (".",)


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (50, 20)).save(tmp_path / "a.jpg", exif=exif)
    manifest = scan_folder(tmp_path)
    assert (manifest.heights[0], manifest.widths[0]) == (20, 50)


def test_images_beside_class_folders(folder):
    write(folder / "stray.jpg")
    with pytest.raises(UserError, match=r"1 images \(e.g. stray.jpg\) lie beside class folders"):
        scan_folder(folder)


def test_other_files_are_counted(folder):
    (folder / "cat" / "moving.gif").write_bytes(b"GIF89a")
    (folder / "readme").write_text("x")
    assert "files of other kinds ignored: 1 .gif, 1 no extension" in scan_folder(folder).notes


def test_links_that_lead_nowhere_or_back(folder):
    (folder / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "cat" / "self.png").symlink_to("self.png")
    (folder / "ant" / "deep" / "up").symlink_to("../..")
    (folder / "dog").symlink_to("cat")  # follows as any folder
    manifest = scan_folder(folder)
    assert manifest.names == ("ant/b.jpg", "ant/deep/a.PNG", "cat/c.jpeg", "dog/c.jpeg")
    assert manifest.notes[0] == (
        "5 broken or circular links left out: ant/deep/up, cat/gone.jpg, cat/self.png and 2 more"
    )


def test_only_broken_links(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"no images; found 0 folders and 1 broken .*: a.jpg;"):
        scan_folder(tmp_path)


def test_names_that_are_no_utf8(folder, capsys):
    os.rename(folder / "cat" / "c.jpeg", os.fsencode(folder / "cat") + b"/c\xff.jpg")
    scanned = scan_folder(folder)
    assert os.fsencode(scanned.names[2]) == b"cat/c\xff.jpg"
    run_scan(ScanArgs(dir=str(folder)))
    saved = open_manifest(folder)
    assert (saved.names, saved.sha) == (scanned.names, scanned.sha)
    assert read_image(saved.paths[2]).shape == (9, 3, 3)
    (folder / "cat" / os.fsdecode(b"\xfe.jpg")).write_bytes(b"")
    run_scan(ScanArgs(dir=str(folder)))
    with pytest.raises(UserError, match=r'unreadable images: "cat/\\udcfe.jpg"; run') as error:
        open_manifest(folder)
    str(error.value).encode()


def test_a_save_that_fails_leaves_nothing(folder, monkeypatch):
    def full(path, **_):
        path.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(folder.iterdir())
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        scan_folder(folder).save(folder / "manifest.npz")
    assert sorted(folder.iterdir()) == before


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match=r"found nothing .* exists"):
        find_split(str(tmp_path / "absent" / "deeper"), "train")
    with pytest.raises(UserError, match="found a file"):
        find_split(str(write(tmp_path / "file.jpg")), "train")
    empty = tmp_path / "empty"
    (empty / "ant").mkdir(parents=True)
    (empty / "ant" / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"no images; found 1 folders and .*1 \.gif"):
        scan_folder(empty)


def test_splits(tmp_path):
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


def test_saved_manifest_equals_the_scan(folder, capsys):
    scanned = scan_folder(folder)
    run_scan(ScanArgs(dir=str(folder)))
    assert "3 images, 3 classes" in capsys.readouterr().out
    saved = open_manifest(folder)
    assert (saved.names, saved.classes, saved.sha) == (scanned.names, scanned.classes, scanned.sha)
    for name in ("labels", "heights", "widths", "num_bytes"):
        np.testing.assert_array_equal(getattr(saved, name), getattr(scanned, name))


@pytest.mark.parametrize("change", ["add", "remove", "resize"])
def test_stale_manifest_is_refused(folder, change):
    run_scan(ScanArgs(dir=str(folder)))
    if change == "add":
        write(folder / "cat" / "new.jpg")
    elif change == "remove":
        (folder / "ant" / "b.jpg").unlink()
    else:
        write(folder / "ant" / "b.jpg", 300, 400)
    with pytest.raises(UserError, match=r"stale .* run `deepmim-scale data scan"):
        open_manifest(folder)


def test_broken_manifest_is_one_line(folder):
    (folder / "manifest.npz").write_bytes(b"PK half a file")
    with pytest.raises(UserError, match=r"cannot be read; run `deepmim-scale data scan"):
        open_manifest(folder)


def test_folders_must_be_writable(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="is not writable"):
        run_scan(ScanArgs(dir=str(folder)))


def test_unreadable_headers_fail_or_are_left_out(folder, capsys):
    (folder / "cat" / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 unreadable images: cat/bad.jpg; run .* data verify"):
        open_manifest(folder)
    manifest = open_manifest(folder, on_bad="replace")
    assert "cat/bad.jpg" not in manifest.names
    assert manifest.notes[-1] == "1 unreadable images left out: cat/bad.jpg"
    run_scan(ScanArgs(dir=str(folder)))
    assert "1 headers cannot be read" in capsys.readouterr().out
    assert open_manifest(folder, on_bad="replace").names == manifest.names


def test_quarantine_is_honoured(folder):
    (folder / "cat" / "bad.jpg").write_bytes(b"")
    (folder / "quarantine.txt").write_text("cat/bad.jpg\tunreadable: empty\nant/b.jpg\tdamaged\n")
    manifest = open_manifest(folder)
    assert manifest.names == ("ant/deep/a.PNG", "cat/c.jpeg")
    assert manifest.labels.tolist() == [0, 2]
    assert manifest.notes[-1].startswith("2 quarantined images left out")
