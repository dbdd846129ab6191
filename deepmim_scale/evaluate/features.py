"""Frozen features of a pre-trained encoder, at every block that fed a decoder.

Legend: N images, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepmim_scale.batch import masking_from_noise
from deepmim_scale.checkpoint.files import resolve
from deepmim_scale.checkpoint.save import load_weights
from deepmim_scale.images import normalize
from deepmim_scale.models import Model, build_model
from deepmim_scale.runs.folder import load_run_config

POOLS = ("class", "mean", "2x2")


class Key(NamedTuple):
    """What was probed: which encoder, at which block, pooled how."""

    encoder: str
    features: str
    pool: str


PIXELS = Key("-", "raw pixels", "-")


def load_model(run: str | Path, from_step: str = "") -> Model:
    """The whole model of a run with the weights of a checkpoint (default: the newest)."""
    config = load_run_config(run)
    model = build_model(config.model, seed=config.seed)
    load_weights(resolve(run, from_step), model)
    return model.eval()


def untrained_model(run: str | Path) -> Model:
    """The model with which a run began."""
    config = load_run_config(run)
    return build_model(config.model, seed=config.seed).eval()


def embedded(model: Model, images: Tensor) -> Tensor:
    """Tokens [N, L+1, D] before the first block, of images [N, 3, S, S], uint8 or normalized."""
    num_patches = model.config.num_patches
    order = torch.arange(num_patches, dtype=torch.float32, device=images.device)
    everything = masking_from_noise(order.expand(len(images), -1), num_patches)
    return model.embed(normalize(images), everything)[0]


@torch.no_grad()
def hidden_states(model: Model, images: Tensor) -> Iterator[Tensor]:
    """Tokens [N, L+1, D] after each block, class token first, of images [N, 3, S, S] unmasked.

    The last block's tokens are normalized by the encoder's final norm, as its decoder sees them.
    """
    hidden = embedded(model, images)
    for index, block in model.blocks.items():
        hidden = block(hidden)
        yield model.norm(hidden) if int(index) + 1 == model.config.depth else hidden


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


def pooled(encoder: str, model: Model, images: Tensor, pools: Sequence[str]) -> dict[Key, Tensor]:
    """Features [N, F] of every tapped block by every pooling, of images [N, 3, S, S]."""
    result = {}
    for number, hidden in enumerate(hidden_states(model, images), start=1):
        if number in model.config.taps:
            for kind in pools:
                result[Key(encoder, f"block{number:02d}", kind)] = pool(hidden, kind)
    return result
