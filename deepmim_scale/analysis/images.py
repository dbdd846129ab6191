"""The validation images that are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from deepmim_scale.config import RunConfig
from deepmim_scale.data.feed import iter_validation
from deepmim_scale.data.manifest import Manifest, find_split, open_manifest
from deepmim_scale.errors import UserError


def open_validation(data: str) -> Manifest:
    """The validation part of `data`; UserError if it has none."""
    folder = find_split(data, "val")
    if folder is None:
        raise UserError(f"data={data}: has no validation part; needs {data}/val/<class>")
    return open_manifest(folder)


def evenly_spaced(manifest: Manifest, count: int) -> Manifest:
    """`count` images spread evenly over the listing, hence over the classes; all if it is short."""
    chosen = np.zeros(len(manifest), bool)
    chosen[np.linspace(0, len(manifest) - 1, count).round().astype(int)] = True
    return manifest.keep(chosen)


def whole_images(config: RunConfig, manifest: Manifest) -> Iterator[Tensor]:
    """Batches uint8 [B, 3, S, S] of the run's input size, cut as in validation."""
    for batch in iter_validation(config, manifest, replica=0, num_replicas=1):
        yield batch.images
