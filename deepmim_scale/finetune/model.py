"""An encoder's weights in timm's VisionTransformer, and a new head for the classes."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from deepmim_scale.checkpoint.encoders import Encoder
from deepmim_scale.errors import UserError
from deepmim_scale.models.classifier import resize_position_table

# MAE begins with a head that says nothing.
HEAD_STD = 2e-5


def fitting_tensors(encoder: Encoder, model: nn.Module, keep_head: bool) -> dict[str, Tensor]:
    """An encoder's weights as `model` needs them, position table resized; without `norm` for means.

    UserError names a tensor of another shape, or that is missing.
    """
    target = model.state_dict()
    tensors = dict(encoder.tensors)
    if "fc_norm.weight" in target and not keep_head:
        # Made new: the pre-training norm is for single tokens.
        tensors = {n: v for n, v in tensors.items() if not n.startswith(("norm.", "fc_norm."))}
    if not keep_head:
        tensors = {n: v for n, v in tensors.items() if not n.startswith(("head.", "fc_norm."))}
    grid = model.patch_embed.grid_size  # type: ignore[union-attr]
    table = tensors["pos_embed"]
    tensors["pos_embed"] = resize_position_table(table, grid, encoder.sizes.grid)  # type: ignore[arg-type]
    new = set() if keep_head else {n for n in target if n.startswith(("head.", "fc_norm."))}
    for name in sorted(set(target) - new):
        if name not in tensors:
            raise UserError(f"{encoder.source}: {name}: missing; give the checkpoint of this model")
        if tensors[name].shape != target[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, the model {tuple(target[name].shape)}"
            raise UserError(f"{encoder.source}: {name} has shape {shapes}; give the same sizes")
    unknown = sorted(set(tensors) - set(target))
    if unknown:
        raise UserError(f"{encoder.source}: {unknown[0]}: not in this model; check --depth, --pool")
    return tensors


def load_encoder_into(model: nn.Module, encoder: Encoder, *, keep_head: bool, seed: int) -> None:
    """Put an encoder's weights into `model`; a head that is not kept begins near zero, as MAE's."""
    tensors = fitting_tensors(encoder, model, keep_head)
    model.load_state_dict(tensors, strict=False)  # fitting_tensors was strict
    if not keep_head:
        begin_head(model, seed)


def begin_head(model: nn.Module, seed: int) -> None:
    """Draw the head's weights with a deviation of 2e-5, bias 0."""
    assert isinstance(model.head, nn.Linear), "timm's ViT has a linear head"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunc_normal_(model.head.weight, std=HEAD_STD)
        nn.init.zeros_(model.head.bias)
