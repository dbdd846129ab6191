"""Linear CKA: how alike the representations of two blocks are, of one encoder or of two.

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited"; its HSIC by the
unbiased estimator of Song et al. 2012 (as Nguyen et al. 2021), since the plain one tends to 1 where
features are wider than images are many. Legend: N images, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deepmim_scale.evaluate.features import pool
from deepmim_scale.models import Model

FEWEST = 4  # images that the unbiased estimator needs


def gram(features: Tensor) -> Tensor:
    """Gram matrix [N, N] of features [N, F] in float64, centered, its diagonal zero."""
    centered = features.double() - features.double().mean(0)
    return (centered @ centered.T).fill_diagonal_(0.0)


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Unbiased HSIC (a scalar) of two Gram matrices [N, N] with zero diagonals, N >= 4."""
    n = len(k)
    total = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (k.sum(0) @ l.sum(0))) / (n * (n - 3))


def cka(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """CKA [len(first), len(second)] of features [N, F_i] and [N, F_j] of the same N images."""
    rows, columns = ([gram(features) for features in side] for side in (first, second))
    norms = [torch.stack([hsic(k, k) for k in side]).sqrt() for side in (rows, columns)]
    table = torch.stack([torch.stack([hsic(k, l) for l in columns]) for k in rows])  # noqa: E741
    return table / torch.outer(*norms)


@torch.no_grad()
def block_features(model: Model, batches: Iterable[Tensor]) -> list[Tensor]:
    """Mean patch tokens [N, D] after every block, of batches [B, 3, S, S] unmasked."""
    parts = [[pool(tokens, "mean") for tokens in model.features(b)] for b in batches]
    return [torch.cat(block) for block in zip(*parts, strict=True)]


def draw(table: Tensor, names: Sequence[str], taps: Sequence[Sequence[int]], path: Path) -> None:
    """A PNG: heat map of CKA [rows, columns], ticks at the blocks that feed a decoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 4.4))
    edges = (0.5, table.shape[1] + 0.5, 0.5, table.shape[0] + 0.5)
    picture = axes.imshow(table.numpy(), origin="lower", vmin=0, vmax=1, extent=edges)
    axes.set(ylabel=f"block of {names[0]}", xlabel=f"block of {names[1]}")
    axes.set(yticks=sorted({1, *taps[0]}), xticks=sorted({1, *taps[1]}))
    figure.colorbar(picture, label="linear CKA")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
