"""Frozen features of a pre-trained encoder, at every block that fed a decoder.

Legend: N images, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepmim_scale.checkpoint import networks
from deepmim_scale.evaluate.frozen import FrozenEncoder
from deepmim_scale.models import Model

POOLS = ("class", "mean", "2x2")


class Key(NamedTuple):
    """What was probed: which encoder, at which block, pooled how."""

    encoder: str
    features: str
    pool: str


PIXELS = Key("-", "raw pixels", "-")


def load_model(run: str | Path, from_step: str = "") -> Model:
    """The whole model of a run with the weights of a checkpoint (default: the newest)."""
    return networks.trained(str(run), from_step)


def pool(tokens: Tensor, kind: str) -> Tensor:
    """Tokens [N, L+1, D] as one vector: `class` or `mean` [N, D], or `2x2` [N, 4 D].

    2x2 averages the patches of each quarter of the image.
    """
    if kind == "class":
        return tokens[:, 0]
    patches = tokens[:, 1:].transpose(1, 2)
    grid = round(patches.shape[2] ** 0.5)
    side = {"mean": 1, "2x2": 2}[kind]
    planes = patches.unflatten(2, (grid, grid))
    return torch.nn.functional.adaptive_avg_pool2d(planes, side).flatten(1)


def pooled(
    name: str, encoder: FrozenEncoder, images: Tensor, pools: Sequence[str]
) -> dict[Key, Tensor]:
    """Features [N, F] of every probed block by every pooling, of images [N, 3, S, S]."""
    return {
        Key(name, f"block{number:02d}", kind): pool(tokens, kind)
        for number, tokens in encoder.tokens(images).items()
        for kind in pools
    }
