"""Parameter groups, learning-rate rule and schedule of MAE (main_pretrain.py, util/lr_sched.py)."""

from __future__ import annotations

import math
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

from deepmim_scale.config import RunConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: no decay for 1-D parameters and biases, decay for the rest (tokens included)."""
    return param_groups_weight_decay(module, weight_decay)


def peak_learning_rate(config: RunConfig, global_batch: int) -> float:
    """lr = blr * global_batch / 256."""
    return config.blr * global_batch / 256


def learning_rate(
    peak: float, epoch: float, *, warmup_epochs: float, total_epochs: float, floor: float = 0.0
) -> float:
    """Rate at a fractional epoch: linear from 0 during the warm-up, a half-cosine to `floor`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(total_epochs - warmup_epochs, 1e-12)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
