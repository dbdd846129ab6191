"""Frozen features of a pre-trained encoder, at every block that fed a decoder.

Legend: N images, L patches, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deepmim_scale.checkpoint.files import resolve
from deepmim_scale.checkpoint.save import load_weights
from deepmim_scale.models import Model, build_model
from deepmim_scale.models.masking import masking_from_noise
from deepmim_scale.targets.pixels import normalise
from deepmim_scale.train.run_folder import load_run_config

BATCH = 256


def load_model(run: str | Path) -> Model:
    """The whole model of a run with the weights of its newest checkpoint."""
    config = load_run_config(run)
    model = build_model(config.model, seed=config.seed)
    load_weights(resolve(run), model)
    return model.eval()


def untrained_model(run: str | Path) -> Model:
    """The model with which a run began."""
    config = load_run_config(run)
    return build_model(config.model, seed=config.seed).eval()


@torch.no_grad()
def tapped_tokens(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Patch tokens [N, L, D] after every tapped block, of uint8 images [N, 3, S, S], unmasked.

    The last block's tokens are normalised by the encoder's final norm, as its decoder sees them.
    """
    config = model.config
    result: dict[str, list[Tensor]] = {f"block{block:02d}": [] for block in config.taps}
    for part in images.split(BATCH):
        order = torch.arange(config.num_patches, dtype=torch.float32).expand(len(part), -1)
        everything = masking_from_noise(order, config.num_patches)
        hidden = model.embed(normalise(part), everything)[0]
        for index, block in model.blocks.items():
            hidden = block(hidden)
            name = f"block{int(index) + 1:02d}"
            if name in result:
                last = int(index) + 1 == config.depth
                result[name].append((model.norm(hidden) if last else hidden)[:, 1:])
    return {name: torch.cat(parts) for name, parts in result.items()}


def pool(tokens: Tensor, side: int) -> Tensor:
    """Tokens [N, L, D] averaged over a side x side division of the image: [N, side * side * D]."""
    grid = round(tokens.shape[1] ** 0.5)
    planes = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return torch.nn.functional.adaptive_avg_pool2d(planes, side).flatten(1)
