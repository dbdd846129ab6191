"""The quickstart's probe: scikit-learn's digits with 100 labels, raw pixels against features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deepmim_scale.data.samples import load_digits_probe
from deepmim_scale.errors import UserError
from deepmim_scale.evaluate.features import PIXELS, Key, pooled
from deepmim_scale.evaluate.frozen import open_frozen
from deepmim_scale.evaluate.probes import PROBES

NUM_LABELS = 100
NUM_DRAWS = 5
POOLS = ("mean", "2x2")


@dataclass(frozen=True)
class ProbeScore:
    """One line of the table: mean and standard deviation over the draws, percent."""

    encoder: str
    features: str
    pool: str
    probe: str
    mean: float
    std: float


def probe_rows(key: Key, features: np.ndarray, labels: np.ndarray) -> list[ProbeScore]:
    """Rows of all probes for features [N, F] with labels [N]; the draws are fixed."""
    rows = []
    for probe, accuracy in PROBES.items():
        scores = []
        for draw in range(NUM_DRAWS):
            order = np.random.RandomState(draw).permutation(len(labels))
            train, test = order[:NUM_LABELS], order[NUM_LABELS:]
            parts = features[train], labels[train], features[test], labels[test]
            scores.append(100 * accuracy(*parts))
        rows.append(ProbeScore(*key, probe, float(np.mean(scores)), float(np.std(scores))))
    return rows


def probe_run(run: str, from_step: str = "") -> list[ProbeScore]:
    """The whole table of a run: raw pixels, untrained and trained encoder, per tapped block."""
    trained, untrained = open_frozen(run, from_step)
    size = trained.config.model.img_size
    if size != 32:
        raise UserError(f"run={run}: img_size is {size}; digits are 32 px")
    pixels, labels = load_digits_probe()
    rows = probe_rows(PIXELS, pixels[:, 0].reshape(len(pixels), -1) / 255, labels)
    images = torch.from_numpy(pixels)
    for name, encoder in (("untrained", untrained), ("trained", trained)):
        for key, features in pooled(name, encoder, images, POOLS).items():
            rows += probe_rows(key, features.numpy(), labels)
    return rows


def table(rows: list[ProbeScore]) -> str:
    """Markdown: a line per features and pooling, a column per probe, accuracies in percent."""
    probes = list(dict.fromkeys(row.probe for row in rows))
    lines = [
        "| encoder | features | pooling | " + " | ".join(probes) + " |",
        "|---|---|---|" + "---|" * len(probes),
    ]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        cells = groups.setdefault((row.encoder, row.features, row.pool), [])
        cells.append(f"{row.mean:.1f} +- {row.std:.1f}")
    lines += [f"| {' | '.join(key)} | {' | '.join(cells)} |" for key, cells in groups.items()]
    return "\n".join(lines)
