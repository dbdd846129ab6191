"""Two labelled parts of an image folder, DIR/train/<class> and DIR/val/<class>. Imports no torch.

Legend: N training images, M validation images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from deepmim_scale.data.manifest import Manifest, find_split, open_manifest
from deepmim_scale.errors import UserError


@dataclass(frozen=True)
class Classes:
    """The two parts of a labelled folder; labels count the classes of train in sorted order."""

    train: Manifest
    val: Manifest
    labels: np.ndarray
    """int64 [N]."""
    expected: np.ndarray
    """int64 [M]."""

    @property
    def fewest(self) -> tuple[str, int]:
        """The smallest training class and its number of images."""
        return min(Counter(_class_names(self.train)).items(), key=lambda item: item[1])

    @property
    def largest(self) -> float:
        """Accuracy of always naming the largest training class."""
        return float((self.expected == np.bincount(self.labels).argmax()).mean())


def _class_names(manifest: Manifest) -> list[str]:
    return [manifest.classes[label] for label in manifest.labels]


def open_classes(data: str) -> Classes:
    """UserError if train or val lacks classes, has a single one, or val has others than train."""
    val_folder, train_folder = find_split(data, "val"), find_split(data, "train")
    if val_folder is None or train_folder is None:
        raise UserError(f"data={data}: has no val; needs {data}/train/<class> and val/<class>")
    train, val = open_manifest(train_folder), open_manifest(val_folder)
    for manifest in (train, val):
        if manifest.classes == (".",):
            raise UserError(f"data={manifest.root}: has no classes; needs a folder for each")
    names = sorted(set(_class_names(train)))
    if len(names) == 1:
        raise UserError(f"data={train.root}: has the single class {names[0]}; needs two or more")
    foreign = sorted(set(_class_names(val)) - set(names))
    if foreign:
        raise UserError(
            f"data={val.root}: class {foreign[0]} has no images in train; use the same classes"
        )
    number = {name: i for i, name in enumerate(names)}
    labels, expected = ([number[name] for name in _class_names(part)] for part in (train, val))
    return Classes(train, val, np.array(labels), np.array(expected))
