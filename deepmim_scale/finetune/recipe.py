"""Parameter groups and losses of fine-tuning, as MAE's util/lr_decay.py and main_finetune.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

# Norm and head after the last block learn at the full rate, as BEiT and MAE have it.
_AFTER_BLOCKS = ("norm.", "fc_norm.", "head.")


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups with `lr_scale` = layer_decay ** (depth + 1 - layer) for timm's VisionTransformer.

    Layer 0 is the embedding, layer i + 1 block i, the last one norms and head. Nothing that is 1-D
    is decayed, and neither are the class token and the position table.
    """
    groups = param_groups_layer_decay(
        model,
        weight_decay,
        no_weight_decay_list=model.no_weight_decay(),  # type: ignore[operator]
        layer_decay=layer_decay,
    )
    # timm gives `norm`, which a class token passes through, the scale of the last block.
    after = {id(p) for n, p in model.named_parameters() if n.startswith(_AFTER_BLOCKS)}
    top = {g["weight_decay"]: g for g in groups if g["lr_scale"] == 1.0}
    for group in groups:
        strays = [p for p in group["params"] if id(p) in after and group["lr_scale"] != 1.0]
        if strays:
            kept = {id(p) for p in strays}
            group["params"] = [p for p in group["params"] if id(p) not in kept]
            top[group["weight_decay"]]["params"] += strays
    return [group for group in groups if group["params"]]


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
