"""Parameter groups, learning-rate rule and schedule of MAE (main_pretrain.py, util/lr_sched.py)."""

from __future__ import annotations

import math
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

from deepmim_scale.config import RunConfig
from deepmim_scale.parallel.stages import part_of_parameter
from deepmim_scale.plan.timing import MAX_PIECES


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for 1-D parameters and biases, decay for the rest (tokens included).

    On a rank's stages both come for each part of each stage (`part`), and the second for a few
    pieces of a part, as gradients are summed over the replicas piece by piece.
    """
    places = {p: part_of_parameter(name) for name, p in module.named_parameters()}
    pieces: dict[str, list[int]] = {}
    for part, piece in sorted(set(places.values())):
        pieces.setdefault(part, []).append(piece)
    groups: dict[tuple[str, float, int], dict[str, Any]] = {}
    for both in param_groups_weight_decay(module, weight_decay):
        for parameter in both["params"]:
            part, piece = places[parameter]
            # Norms and biases are too small to be worth pieces.
            known = pieces[part] if both["weight_decay"] else [piece]
            number = known.index(piece) * min(MAX_PIECES, len(known)) // len(known)
            key = (part, both["weight_decay"], number)
            group = groups.setdefault(key, both | {"part": part, "params": []})
            group["params"].append(parameter)
    return list(groups.values())


def peak_learning_rate(config: RunConfig, global_batch: int) -> float:
    """lr = blr * global_batch / 256."""
    return config.blr * global_batch / 256


def learning_rate(peak: float, epoch: float, *, warmup_epochs: float, total_epochs: float) -> float:
    """Rate at a fractional epoch: linear from 0 during the warm-up, then a half-cosine to 0."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(total_epochs - warmup_epochs, 1e-12)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
