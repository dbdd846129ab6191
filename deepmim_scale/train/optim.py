"""Parameter groups, learning-rate rule and schedule of MAE (main_pretrain.py, util/lr_sched.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import Lars as TimmLars
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from deepmim_scale.config import RunConfig
from deepmim_scale.parallel.stages import part_of_parameter
from deepmim_scale.plan.timing import num_pieces


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for 1-D parameters and biases, decay for the rest (tokens included).

    On a rank's stages both come for each part of each stage (`part`), and the second for a few
    pieces of a part, as gradients are summed over the replicas piece by piece.
    """
    places = {p: part_of_parameter(name) for name, p in module.named_parameters()}
    pieces: dict[str, list[int]] = {}
    for part, piece in sorted(set(places.values())):
        pieces.setdefault(part, []).append(piece)
    sizes: Counter[str] = Counter()
    for parameter, (part, _) in places.items():
        sizes[part] += parameter.numel() * parameter.requires_grad
    rounded = rounded_by_autocast(module)
    groups: dict[tuple[str, float, int, bool], dict[str, Any]] = {}
    for both in param_groups_weight_decay(module, weight_decay):
        for parameter in both["params"]:
            part, piece = places[parameter]
            # Norms and biases are too small to be worth pieces.
            known = pieces[part] if both["weight_decay"] else [piece]
            count = num_pieces(len(known), sizes[part])
            # Where they do not divide, the piece that is summed last is the smallest.
            after = len(known) - 1 - known.index(piece)
            number = count - 1 - after * count // len(known)
            # Tokens and matrices under a weight norm are few: they need no pieces either.
            is_rounded = parameter in rounded
            key = (part, both["weight_decay"], number if is_rounded else 0, is_rounded)
            facts = {"part": part, "is_rounded": is_rounded, "params": []}
            group = groups.setdefault(key, both | facts)
            group["params"].append(parameter)
    return list(groups.values())


def rounded_by_autocast(module: nn.Module) -> set[nn.Parameter]:
    """Weights that autocast casts to 16 bits before their only use, a matrix product."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    own = (dict(layer.named_parameters(recurse=False)) for layer in layers)
    # A weight norm has no `weight` of its own: it scales another matrix in fp32.
    return {parameters["weight"] for parameters in own if "weight" in parameters}


def peak_learning_rate(config: RunConfig, global_batch: int) -> float:
    """lr = blr * global_batch / 256."""
    return config.blr * global_batch / 256


def stable_until(total: float, decay_share: float) -> float:
    """Where the rate of `wsd` begins to fall, in the unit of `total`."""
    return total * (1 - decay_share)


def wsd_rate(
    peak: float, epoch: float, *, warmup_epochs: float, total_epochs: float, decay_share: float
) -> float:
    """Warm-up from 0, a constant rate, then peak * (1 - sqrt(progress)) down to 0.

    Source: Haegele et al. 2024, arXiv 2405.18392, section 3 (1-sqrt decay).
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    start = max(stable_until(total_epochs, decay_share), warmup_epochs)
    progress = max(epoch - start, 0.0) / max(total_epochs - start, 1e-12)
    return peak * (1 - math.sqrt(min(progress, 1.0)))


def run_rate(config: RunConfig, peak: float, epoch: float, total_epochs: float) -> float:
    """Rate of a pre-training run at a fractional epoch."""
    if config.lr_schedule == "wsd":
        return wsd_rate(
            peak,
            epoch,
            warmup_epochs=config.warmup_epochs,
            total_epochs=total_epochs,
            decay_share=config.decay_share,
        )
    return learning_rate(peak, epoch, warmup_epochs=config.warmup_epochs, total_epochs=total_epochs)


def learning_rate(
    peak: float, epoch: float, *, warmup_epochs: float, total_epochs: float, min_lr: float = 0.0
) -> float:
    """Rate at a fractional epoch: linear from 0 during the warm-up, a half-cosine to `min_lr`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(total_epochs - warmup_epochs, 1e-12)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


# Norm and head after the last block learn at the full rate, as BEiT and MAE have it.
_AFTER_BLOCKS = ("norm.", "fc_norm.", "head.")


def finetune_groups(
    model: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
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


class Lars(TimmLars):
    """LARS as MAE's util/lars.py: matrices adapt, 1-D parameters neither adapt nor decay.

    timm's adds the decay to the norm of the gradient; here it is part of the gradient. It needs
    whole tensors and does not work on ZeRO's shards.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        given = list(params)
        self._decay = weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [p for p in given if p.ndim > 1], "always_adapt": True},
            {"params": [p for p in given if p.ndim <= 1]},
        ]
        super().__init__(groups, lr=lr, momentum=momentum, trust_coeff=trust_coefficient, eps=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.add_(parameter, alpha=self._decay)
        return super().step(closure)
