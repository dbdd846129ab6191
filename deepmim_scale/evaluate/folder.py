"""Probes of frozen features on your own classes: DIR/train/<class> and DIR/val/<class>.

Every tapped block of the trained encoder, of the untrained one, and pixels stand side by side.
Legend: N training images, M validation images, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from deepmim_scale.data.classes import Classes
from deepmim_scale.data.source import Source, good_ids
from deepmim_scale.data.step_loader import iter_validation
from deepmim_scale.evaluate.features import PIXELS, Key, pooled
from deepmim_scale.evaluate.frozen import FrozenEncoder
from deepmim_scale.images import normalize

THUMBNAIL = 32  # longest side of the pixels that are probed as they are

# (train [N, F], labels [N], test [M, F], expected [M]) -> accuracy
Probe = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


def features_of(
    encoders: dict[str, FrozenEncoder], source: Source, pools: Sequence[str]
) -> dict[Key, np.ndarray]:
    """Features [N, F] of all good images, resized and cut as in validation, decoded once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    config = next(iter(encoders.values())).config
    parts: dict[Key, list[np.ndarray]] = {}
    batches = iter_validation(config, source, device=device)
    total = -(-len(good_ids(source)) // config.microbatch_size)
    for batch in tqdm(batches, total=total, unit="batch", desc="features", disable=None):
        side = min(THUMBNAIL, *config.model.image_format.size)
        pixels = normalize(batch.images, config.model.pixel_statistics)
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, side)
        values = {PIXELS: small.flatten(1)}
        for name, encoder in encoders.items():
            values |= pooled(name, encoder, batch.images, pools)
        for key, value in values.items():
            parts.setdefault(key, []).append(value.cpu().numpy())
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


def probe_folder(
    encoders: dict[str, FrozenEncoder], classes: Classes, probe: Probe, pools: Sequence[str]
) -> dict[Key, float]:
    """Accuracy in percent of `probe` for pixels and for every encoder, block and pooling."""
    train = features_of(encoders, classes.train, pools)
    test = features_of(encoders, classes.val, pools)
    keys = tqdm(train, unit="probe", desc="probes", disable=None)
    return {
        key: 100 * probe(train[key], classes.labels, test[key], classes.expected) for key in keys
    }


def table(accuracies: dict[Key, float], pools: Sequence[str]) -> str:
    """Markdown: a line per encoder and block, a column per pooling, in percent."""
    lines = [f"| encoder | features | {' | '.join(pools)} |", "|---|---|" + "---|" * len(pools)]
    rows = dict.fromkeys((key.encoder, key.features) for key in accuracies if key != PIXELS)
    for row in rows:
        cells = [f"{accuracies[Key(*row, kind)]:.1f}" for kind in pools]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    return "\n".join(lines)
