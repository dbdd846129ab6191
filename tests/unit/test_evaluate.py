"""FrozenConfig features, the probes on them, and `evaluate knn|linear` on folders of classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from deepmim_scale.batch import masking_from_noise
from deepmim_scale.cli import main
from deepmim_scale.data.classes import open_classes
from deepmim_scale.evaluate import probes
from deepmim_scale.evaluate.features import load_model, pool
from deepmim_scale.models.stage import State

Damage = Callable[[Path], object]

COLORS = {"blue": (20, 40, 200), "green": (30, 190, 40), "red": (210, 30, 20)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy colors, 6 training images each; val lacks the first class."""
    root, random = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, count, names in (
        ("train", 6, ["blue", "green", "red"]),
        ("val", 4, ["red", "green"]),
    ):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = COLORS[name] + random.normal(0, 15, (80, 96, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


@pytest.mark.parametrize("preset", ["debug", "debug_mirl"])
def test_hidden_states_are_what_decoders_see(
    preset: str, finished_run: Callable[[str], Path]
) -> None:
    """The encoder's own path with nothing masked; MIRL's decoders see them through a carry."""
    model = load_model(finished_run(preset))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    order = torch.arange(64.0).expand(2, -1)
    seen: dict[str, Tensor] = {}

    def tap(name: str, tensors: State) -> State:
        seen[name] = tensors[-1]
        return tensors

    with torch.no_grad():
        model.encode(model.embed(images, masking_from_noise(order, 64)), tap)
        states = list(model.features(images))
        for (number, name), got in zip(model.decoder_names.items(), seen.values(), strict=True):
            expected = states[number - 1]
            if preset == "debug_mirl":
                expected = model.carries[name](expected)
            assert torch.equal(got, expected)
    assert len(states) == 12


def test_pools() -> None:
    tokens = torch.arange(17.0)[None, :, None] * torch.tensor([1.0, 10.0])  # patches 1 .. 16
    assert pool(tokens, "class").tolist() == [[0, 0]]
    assert pool(tokens, "mean").tolist() == [[8.5, 85]]
    quarters = [(1 + 2 + 5 + 6) / 4, (3 + 4 + 7 + 8) / 4, (9 + 10 + 13 + 14) / 4, 13.5]
    assert pool(tokens, "2x2").tolist() == [[*quarters, *(10 * q for q in quarters)]]


@pytest.mark.parametrize("k", [1, 5, 40])
def test_weighted_knn_equals_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ROWS", 7)
    random = np.random.default_rng(k)
    labels, expected = random.integers(0, 3, 60), random.integers(0, 3, 25)
    train, test = (random.normal(size=(len(y), 8)) + y[:, None] * 0.7 for y in (labels, expected))
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    score = reference.fit(train, labels).score(test, expected)
    assert probes.knn_weighted(train, labels, test, expected, k) == pytest.approx(score)
    assert 0.4 < score < 1


def test_linear_probe_learns_what_is_linear() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 5)) * [1, 100, 1e-3, 1, 1]  # standardized inside
    labels = (features[:, 2] > 0).astype(int)
    parts = features[:100], labels[:100], features[100:], labels[100:]
    assert probes.linear(*parts, num_splits=1) > 0.8
    shuffled = random.permutation(labels[100:])
    assert probes.linear(*parts[:3], shuffled) < 0.7


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_command(
    probe: str,
    data: Path,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "table.json"
    words = ["--k", "5"] if probe == "knn" else []
    main(
        [
            "evaluate",
            probe,
            str(finished_run("debug")),
            "--data",
            str(data),
            "--pool",
            "mean",
            "class",
            "--json",
            str(file),
            *words,
        ]
    )
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert "| encoder | features | mean | class |" in printed
    assert "18 training and 8 validation images, 3 classes" in printed
    assert len(result["rows"]) == 1 + 2 * 4 * 2
    first = result["rows"][0]
    assert (first["features"], first["accuracy"]) == ("raw pixels", 100.0)
    means = [row["accuracy"] for row in result["rows"] if row["pool"] == "mean"]
    assert min(means) > 50, "colors are easy: labels and images must have been mixed up"
    assert result["largest_class"] == 0.0, "blue, which val does not have"


def test_classes_are_matched_by_name(data: Path) -> None:
    classes = open_classes(str(data))
    assert classes.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert classes.expected.tolist() == [1] * 4 + [2] * 4
    assert classes.fewest[1] == 6


def _flat(data: Path) -> None:
    for file in (data / "train").rglob("*.png"):
        file.rename(data / "train" / f"{file.parent.name}{file.name}")


def _remove(*paths: str) -> Damage:
    def damage(data: Path) -> None:
        for path in paths:
            place = data / path
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()

    return damage


CASES: dict[str, tuple[str, list[str], Damage, str]] = {
    "no val": ("knn", [], _remove("val"), "has no val; needs"),
    "no classes": ("knn", [], _flat, "train: has no classes; needs a folder for each"),
    "single class": ("knn", [], _remove("train/red", "train/green"), "the single class blue"),
    "foreign class": ("knn", [], _remove("train/red"), "class red has no images in train"),
    "empty val": ("knn", [], _remove("val/red", "val/green"), "val: no images"),
    "large k": ("knn", ["--k", "19"], _remove(), "k=19: must be from 1 to the 18 training images"),
    "no k": ("knn", ["--k", "0"], _remove(), "k=0: must be from 1"),
    "json": ("knn", ["--json", "/proc/nowhere/x"], _remove(), "json=/proc/nowhere/x: cannot be"),
    "unknown pool": (
        "knn",
        ["--pool", "max"],
        _remove(),
        "pool=max: must be one of class, mean, 2x2",
    ),
    "few images": (
        "linear",
        [],
        _remove("train/red/0.png", "train/red/1.png"),
        "4 training images of class red",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes(
    name: str,
    data: Path,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    probe, words, damage, expected = CASES[name]
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    damage(copy)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", probe, str(finished_run("debug")), "--data", str(copy), *words])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("\n")) == (2, 1)
    assert expected in message


def test_digits_checks_its_output_first(
    finished_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "digits", str(finished_run("quickstart")), "--json", "/proc/nowhere/x"])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert "json=/proc/nowhere/x: cannot be written" in captured.err
