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
    # One group for each pair, since ZeRO works on every group by itself.
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            scale = 1.0 if id(parameter) in after else group["lr_scale"]
            merged.setdefault((scale, group["weight_decay"]), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in merged.items()
    ]


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
