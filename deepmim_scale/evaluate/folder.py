"""Probes of frozen features on your own classes: DIR/train/<class> and DIR/val/<class>.

Every tapped block of the trained encoder, of the untrained one, and pixels stand side by side.
Legend: N training images, M validation images, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from deepmim_scale.config import RunConfig
from deepmim_scale.data.source import Source, good_ids
from deepmim_scale.data.step_loader import iter_validation
from deepmim_scale.evaluate.classes import Classes
from deepmim_scale.evaluate.features import PIXELS, Key, load_model, pooled, untrained_model
from deepmim_scale.images import normalize
from deepmim_scale.models import Model
from deepmim_scale.runs.folder import load_run_config

THUMBNAIL = 32  # longest side of the pixels that are probed as they are

# (train [N, F], labels [N], test [M, F], expected [M]) -> accuracy
Probe = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


def features_of(
    models: dict[str, Model], config: RunConfig, source: Source, pools: Sequence[str]
) -> dict[Key, np.ndarray]:
    """Features [N, F] of all good images, resized and cut as in validation, decoded once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {encoder: model.to(device) for encoder, model in models.items()}
    parts: dict[Key, list[np.ndarray]] = {}
    batches = iter_validation(config, source, device=device)
    total = -(-len(good_ids(source)) // config.microbatch_size)
    for batch in tqdm(batches, total=total, unit="batch", desc="features", disable=None):
        side = min(THUMBNAIL, config.model.img_size)
        small = torch.nn.functional.adaptive_avg_pool2d(normalize(batch.images), side)
        values = {PIXELS: small.flatten(1)}
        for encoder, model in models.items():
            values |= pooled(encoder, model, batch.images, pools)
        for key, value in values.items():
            parts.setdefault(key, []).append(value.cpu().numpy())
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


def probe_folder(
    run: str, classes: Classes, probe: Probe, pools: Sequence[str], from_step: str = ""
) -> dict[Key, float]:
    """Accuracy of `probe` for pixels and for every encoder, tapped block and pooling."""
    config = load_run_config(run)
    models = {"untrained": untrained_model(run), "trained": load_model(run, from_step)}
    train = features_of(models, config, classes.train, pools)
    test = features_of(models, config, classes.val, pools)
    keys = tqdm(train, unit="probe", desc="probes", disable=None)
    return {key: probe(train[key], classes.labels, test[key], classes.expected) for key in keys}


def table(accuracies: dict[Key, float], pools: Sequence[str]) -> str:
    """Markdown: a line per encoder and block, a column per pooling, in percent."""
    lines = [f"| encoder | features | {' | '.join(pools)} |", "|---|---|" + "---|" * len(pools)]
    rows = dict.fromkeys((key.encoder, key.features) for key in accuracies if key != PIXELS)
    for row in rows:
        cells = [f"{100 * accuracies[Key(*row, kind)]:.1f}" for kind in pools]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    return "\n".join(lines)
