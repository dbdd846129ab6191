"""Classes of WebDataset shards and parquet by their names, where somebody says them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from containers import write_parquet, write_webdataset
from PIL import Image

from deepmim_scale.data.container_source import ContainerSource
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.data.open_source import open_source

NAMES = ("apple", "banana", "sea-lion")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(NAMES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (16, 12), (40 * label, 20 * number, 0))
                image.save(folder / f"{name}_{number}.png")
    return root


def opened(path: Path) -> ContainerSource:
    source = open_source(str(path), "train")
    assert isinstance(source, ContainerSource)
    return source


def test_a_file_beside_the_shards(photos: Path, tmp_path: Path) -> None:
    path = write_webdataset(photos, tmp_path)
    assert opened(path).classes == ("0", "1", "2")
    numbers = opened(path).labels.tolist()
    (path / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    source = opened(path)
    assert source.classes == NAMES
    assert source.labels.tolist() == numbers, "names change no label and no id"
    assert source.labels.tolist() == open_folder(photos / "train").labels.tolist()


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("a\nb\n", "there are 2 for labels up to 2"),
        ("a\nb\na\n", "some are equal"),
        ("a\nb\n../c\n", "'../c' cannot be a folder's name"),
    ],
)
def test_names_that_cannot_be(photos: Path, tmp_path: Path, lines: str, problem: str) -> None:
    path = write_webdataset(photos, tmp_path)
    (path / "classes.txt").write_text(lines)
    source = opened(path)
    assert source.classes == ("0", "1", "2")
    assert f"class names are not used: {problem}" in source.notes


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (list(NAMES), NAMES),
        ([*NAMES, "unseen"], (*NAMES, "unseen")),
        ("not a list", ("0", "1", "2")),
    ],
)
def test_parquet_tells_its_classes(
    photos: Path, tmp_path: Path, names: object, classes: tuple[str, ...]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write_parquet(photos, tmp_path)
    label = {"names": names, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    text = json.dumps({"info": {"features": features}}).encode()
    for file in (path / "data").iterdir():
        table = parquet.read_table(file)
        parquet.write_table(table.replace_schema_metadata({"huggingface": text}), file)
    assert opened(path).classes == classes
