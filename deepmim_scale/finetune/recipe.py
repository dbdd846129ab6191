"""The losses of fine-tuning, as MAE's main_finetune.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def build_loss(*, mixes: bool, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits [B, K], targets) -> mean loss: soft targets [B, K] where images mix, else labels [B].

    Computed in fp32 at least.
    """
    kind: nn.Module
    if mixes:
        kind = SoftTargetCrossEntropy()  # smoothed when they were mixed
    elif smoothing:
        kind = LabelSmoothingCrossEntropy(smoothing)
    else:
        kind = nn.CrossEntropyLoss()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return kind(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    return loss
