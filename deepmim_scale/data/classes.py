"""Two labelled parts of an image folder, DIR/train/<class> and DIR/val/<class>. Imports no torch.

Legend: N good training images, M good validation images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.source import OnBad, Source, good_ids
from deepmim_scale.errors import UserError


@dataclass(frozen=True)
class Classes:
    """The two parts of a labelled folder; labels count the classes of train in sorted order."""

    train: Source
    val: Source
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


def _class_names(source: Source) -> list[str]:
    """The class of each good image, in the order in which features are computed."""
    return [source.classes[label] for label in source.labels[good_ids(source)]]


def open_classes(data: str, cache: str = "", on_bad: OnBad = "fail") -> Classes:
    """UserError if train or val lacks classes, has a single one, or val has others than train."""
    val = open_source(data, "val", on_bad, cache)
    train = open_source(data, "train", on_bad, cache)
    if val is None or train is None:
        raise UserError(f"data={data}: has no val; needs {data}/train/<class> and val/<class>")
    for part in (train, val):
        if part.classes == (".",):
            raise UserError(f"data={part.location}: has no classes; needs a folder for each")
    names = sorted(set(_class_names(train)))
    if len(names) == 1:
        raise UserError(
            f"data={train.location}: has the single class {names[0]}; needs two or more"
        )
    foreign = sorted(set(_class_names(val)) - set(names))
    if foreign:
        raise UserError(
            f"data={val.location}: class {foreign[0]} has no images in train; use the same classes"
        )
    number = {name: i for i, name in enumerate(names)}
    labels, expected = ([number[name] for name in _class_names(part)] for part in (train, val))
    return Classes(train, val, np.array(labels), np.array(expected))
