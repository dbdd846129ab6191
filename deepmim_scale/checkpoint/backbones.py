"""Encoders as backbones of transformers, for segmentation (BEiT in UPerNet) and detection (ViTDet).

transformers renames its modules between releases; so its own classes are filled and saved here, by
their own `save_pretrained`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.models import Model

_OLDEST = 5


def check_transformers(layout: str) -> None:
    """UserError unless a transformers of the names below is installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"format={layout}: needs transformers 5; pip install 'transformers>=5'")
    import transformers

    if int(transformers.__version__.split(".")[0]) < _OLDEST:
        found = transformers.__version__
        raise UserError(
            f"format={layout}: needs transformers 5, found {found}; install a newer one"
        )


def beit_backbone(model: Model) -> Any:
    """BeitBackbone with absolute positions, whose maps are the tapped blocks' tokens.

    The keys' biases are dropped: they add the same to all of a query's scores.
    """
    from transformers import BeitBackbone, BeitConfig

    config = model.config
    backbone = BeitBackbone(
        BeitConfig(
            **_sizes(config),
            intermediate_size=int(config.embed_dim * config.mlp_ratio),
            use_absolute_position_embeddings=True,
            use_relative_position_bias=False,
            layer_scale_init_value=0.0,
            use_mask_token=False,
        )
    )
    tensors = {
        "beit.embeddings.cls_token": "cls_token",
        "beit.embeddings.position_embeddings": "pos_embed",
        **_both("beit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    }
    names = {
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    weights = model.state_dict()
    content = {theirs: weights[ours] for theirs, ours in tensors.items()}
    for block in range(config.depth):
        layer, ours = f"beit.layers.{block}", f"blocks.{block}"
        for theirs, own in names.items():
            pairs = _both(f"{layer}.{theirs}", f"{ours}.{own}")
            content |= {name: weights[source] for name, source in pairs.items()}
        for kind in ("weight", "bias"):
            thirds = weights[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for role, third in zip(("q", "k", "v"), thirds, strict=True):
                if (role, kind) != ("k", "bias"):
                    content[f"{layer}.attention.{role}_proj.{kind}"] = third.clone()
    return _filled(backbone, content)


def vitdet_backbone(model: Model) -> Any:
    """VitDetBackbone with global attention in every block; it knows no class token.

    Its maps are the tapped blocks' tokens of a network without that token.
    """
    from transformers import VitDetBackbone, VitDetConfig

    config = model.config
    if config.mlp_ratio != int(config.mlp_ratio):
        raise UserError(
            f"format=vitdet: mlp_ratio={config.mlp_ratio}: transformers takes whole numbers; "
            "choose another --format"
        )
    backbone = VitDetBackbone(
        VitDetConfig(
            **_sizes(config),
            mlp_ratio=int(config.mlp_ratio),
            pretrain_image_size=config.img_size,
            window_block_indices=[],
            residual_block_indices=[],
            use_absolute_position_embeddings=True,
            use_relative_position_embeddings=False,
        )
    )
    weights = model.state_dict()
    content = {"embeddings.position_embeddings": weights["pos_embed"]}
    for theirs, ours in _both("embeddings.projection", "patch_embed.proj").items():
        content[theirs] = weights[ours]
    for name, weight in weights.items():
        if name.startswith("blocks."):
            content[
                "encoder.layer." + name.removeprefix("blocks.").replace("attn", "attention")
            ] = weight
    return _filled(backbone, content)


@dataclass(frozen=True)
class Backbone:
    """One of transformers' classes, and how it is made of a model of ours."""

    name: str
    make: Callable[[Model], Any]


BACKBONES = {
    "beit": Backbone("BeitBackbone", beit_backbone),
    "vitdet": Backbone("VitDetBackbone", vitdet_backbone),
}


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "out_indices": list(config.taps),
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }


def _both(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def _filled(backbone: Any, content: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        backbone.load_state_dict(content)
    return backbone.eval()


def save_backbone(model: Model, layout: str, folder: Path) -> int:
    """Write config.json and model.safetensors into `folder`; returns the number of tensors."""
    backbone = BACKBONES[layout].make(model)
    backbone.save_pretrained(folder)
    return len(backbone.state_dict())
