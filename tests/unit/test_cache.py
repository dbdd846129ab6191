"""Listings outside of a read-only data folder: found there first, and never mixed up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from deepmim_scale.cli import main
from deepmim_scale.config import RunConfig
from deepmim_scale.data.cache import cached_folder, listing_folder
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.errors import UserError
from deepmim_scale.train.prepare import prepare


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """DIR with train and val; one file of train is no image."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 6 + i), i).save(root / split / "a" / f"{i}.png")
    (root / "train" / "a" / "bad.png").write_bytes(b"")
    return root


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_commands_write_into_the_cache_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, before = tmp_path / "new" / "cache", files(data)
    monkeypatch.setattr(
        os, "access", lambda path, mode: not Path(path).is_relative_to(data)
    )  # a data folder that is read-only for root too
    with pytest.raises(SystemExit) as stop:
        main(["data", "scan", str(data)])
    assert stop.value.code == 2
    main(["data", "scan", str(data), "--cache", str(cache)])
    with pytest.raises(SystemExit) as stop:
        main(["data", "verify", str(data), "--cache", str(cache)])
    assert stop.value.code == 1
    assert files(data) == before
    names = ["manifest.npz", "quarantine.txt", "verify.json"]
    found = {folder.name: files(folder) for folder in cache.iterdir()}
    assert [name.rsplit("-", 1)[0] for name in sorted(found)] == ["data-train", "data-val"]
    assert list(found.values()) == [names, names]


def test_a_run_reads_the_cache(data: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    config = RunConfig(
        data=str(data),
        output=str(tmp_path / "run"),
        steps=1,
        global_batch=4,
        microbatch_size=4,
    )
    with pytest.raises(UserError, match=r"1 unreadable images: a/bad\.png"):
        prepare(config)
    with pytest.raises(SystemExit):
        main(["data", "verify", str(data), "--cache", cache])
    prepared = prepare(config.replace(cache=cache))
    assert list(prepared.train.bad) == [4]
    assert cache in prepared.train.notes[-1]
    assert len(prepared.train) == 5


def test_the_cache_comes_before_the_folder(data: Path, tmp_path: Path) -> None:
    root, cache = data / "train", str(tmp_path / "cache")
    (root / "quarantine.txt").write_text("a/bad.png\tbeside the images\n")
    assert open_folder(root, cache=cache).bad == {4: "beside the images"}
    listings = listing_folder(root, cache)
    (listings / "quarantine.txt").write_text("a/bad.png\tin the cache\na/0.png\tdamaged\n")
    assert open_folder(root, cache=cache).bad == {4: "in the cache", 0: "damaged"}
    assert open_folder(root).bad == {4: "beside the images"}


def test_a_stale_cache_is_refused_and_says_how_to_renew_it(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    main(["data", "scan", str(data), "--cache", str(cache)])
    Image.new("RGB", (3, 3)).save(data / "val" / "a" / "new.png")
    command = rf"run `deepmim-scale data scan {data}/val --cache {cache}` again"
    with pytest.raises(UserError, match=rf"manifest\.npz is stale \(4 .* {command}"):
        open_folder(data / "val", cache=str(cache))
    main(["data", "scan", f"{data}/val", "--cache", str(cache)])
    assert len(open_folder(data / "val", cache=str(cache))) == 5


def test_folders_do_not_collide(tmp_path: Path) -> None:
    folders = ["x/one/train", "y/one/train", "x/one/val", "x/one-train", "x/one train", "x/é/train"]
    names = {cached_folder(tmp_path / folder, "cache").name for folder in folders}
    assert len(names) == len(folders)
    assert all(name.isascii() and " " not in name for name in names)
    (tmp_path / "x" / "one" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    linked, plain = (
        cached_folder(tmp_path / name / "one/train", "cache") for name in ("link", "x")
    )
    assert linked == plain, "one folder by two names has one listing"


def test_caches_that_cannot_be(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cache=\S+: lies inside \S+; name a folder outside"):
        listing_folder(data / "train", str(data / "train" / "cache"))
    with pytest.raises(UserError, match=r"^cache=/proc/nowhere\S+: cannot be written"):
        listing_folder(data / "train", "/proc/nowhere")
