"""The validation images that are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from deepmim_scale.config import RunConfig
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.source import Source, good_ids
from deepmim_scale.data.step_loader import iter_validation
from deepmim_scale.errors import UserError


def open_validation(data: str, cache: str = "") -> Source:
    """The validation part of `data`; UserError if it has none."""
    source = open_source(data, "val", cache=cache)
    if source is None:
        raise UserError(f"data={data}: has no validation part; needs {data}/val/<class>")
    return source


def evenly_spaced(source: Source, count: int) -> np.ndarray:
    """Ids of `count` good images spread evenly, hence over the classes; of all if there are fewer.

    int64, ascending.
    """
    ids = good_ids(source)
    return ids[np.unique(np.linspace(0, len(ids) - 1, count).round().astype(int))]


def whole_images(config: RunConfig, source: Source, ids: np.ndarray) -> Iterator[Tensor]:
    """Batches uint8 [B, 3, S, S] of the run's input size, cut as in validation."""
    for batch in iter_validation(config, source, ids=ids):
        yield batch.images
