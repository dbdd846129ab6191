"""A run's weights for other libraries: timm, Hugging Face transformers, the official code.

timm's names are ours; the official ones a renaming of all weights. transformers has its own, those
of its hub files (`vit.encoder.layer.0...`), with query, key and value apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from deepmim_scale.checkpoint import files
from deepmim_scale.checkpoint.backbones import BACKBONES, save_backbone
from deepmim_scale.checkpoint.load import load_weights
from deepmim_scale.checkpoint.official import official_names, renamed
from deepmim_scale.checkpoint.sizes import EncoderSizes, header_of
from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.image_format import show_size
from deepmim_scale.methods import decoder_names, method_of
from deepmim_scale.models import Model, build_model
from deepmim_scale.objectives import objective_of
from deepmim_scale.runs.folder import load_run_config
from deepmim_scale.runs.state import read_state

# The method whose decoder transformers has, as ViTMAE.
VIT_MAE = "mae"
LICENCE = "origin not recorded; weights that began as MAE's release are CC-BY-NC 4.0"
# The arguments of timm's vit_base_patch16_224, by our names.
_VIT_BASE = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
}
HF_BLOCK = {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def timm_tensors(model: Model) -> dict[str, Tensor]:
    """The encoder as timm's VisionTransformer without head names it."""
    weights = model.state_dict()
    return {n: w for n, w in weights.items() if not n.startswith(("decoders.", "carries."))}


def official_tensors(model: Model) -> dict[str, Tensor]:
    """The whole model under the names of its method's release; load_official's inverse."""
    weights = model.state_dict()
    return {theirs: weights[ours] for ours, theirs in official_names(model).items()}


def hf_has_decoder(config: ModelConfig) -> bool:
    """Whether transformers knows the decoder: ViTMAE has one, which predicts pixels."""
    return method_of(config).name == VIT_MAE and objective_of(config).is_pixels


def hf_tensors(model: Model) -> dict[str, Tensor]:
    """The encoder as transformers' ViT names it, and for MAE the decoder of ViTMAE."""
    prefixes = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "blocks": "vit.encoder.layer",
        "norm": "vit.layernorm",
    }
    if hf_has_decoder(model.config):
        (decoder,) = decoder_names(model.config).values()
        prefixes |= {
            f"decoders.{decoder}.mask_token": "decoder.mask_token",
            f"decoders.{decoder}.blocks": "decoder.decoder_layers",
            **{
                f"decoders.{decoder}.{part}": f"decoder.decoder_{part}"
                for part in ("embed", "pos_embed", "norm", "pred")
            },
        }
    tensors = {}
    for ours, weight in model.state_dict().items():
        name = renamed(ours, prefixes)
        if name is None:
            continue
        for part, theirs in HF_BLOCK.items():
            name = name.replace(part, theirs)
        if ".attn.qkv." not in name:
            tensors[name] = weight
            continue
        for role, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
            tensors[name.replace(".attn.qkv.", f".attention.attention.{role}.")] = third.clone()
    return tensors


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of transformers' config.json."""
    content = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }
    if not hf_has_decoder(config):
        return content
    return content | {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": config.decoder_embed_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": int(config.decoder_embed_dim * config.mlp_ratio),
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix,
    }


TENSORS: dict[str, Callable[[Model], dict[str, Tensor]]] = {
    "timm": timm_tensors,
    "hf": hf_tensors,
    "mae": official_tensors,
}
# transformers knows one side of an image only.
SQUARE_ONLY = ("hf", *BACKBONES)


def how_to_load(config: ModelConfig, layout: str, output: Path) -> str:
    """A Python expression that loads an exported file."""
    if layout == "timm":
        given = config.model_dump()
        sizes = {key: given[key] for key, usual in _VIT_BASE.items() if given[key] != usual}
        words = "".join(f"{key}={value}, " for key, value in sizes.items())
        return (
            f"timm.create_model('vit_base_patch16_224', num_classes=0, {words}"
            f"checkpoint_path='{output}')"
        )
    if layout in BACKBONES:
        return f"transformers.{BACKBONES[layout].name}.from_pretrained('{output.parent}')"
    if layout == "mae":
        return (
            f"deepmim_scale.checkpoint.load_official(model, safetensors.torch.load_file("
            f"'{output}'), source='{config.method}')"
        )
    if hf_has_decoder(config):
        return f"transformers.ViTMAEForPreTraining.from_pretrained('{output.parent}')"
    return f"transformers.ViTModel.from_pretrained('{output.parent}', add_pooling_layer=False)"


def export(run: str, layout: str, output: Path, from_step: str = "") -> list[str]:
    """Write a checkpoint of `run` as one safetensors file, for hf with config.json; "" is newest.

    Returns what to tell the user, line by line.
    """
    config = load_run_config(run)
    if layout in SQUARE_ONLY and not isinstance(config.model.img_size, int):
        size = show_size(config.model.img_size)
        raise UserError(f"format={layout}: takes square images, not img_size={size}; use timm")
    folder = files.resolve(run, from_step)
    step = read_state(folder).step
    model = build_model(config.model, seed=config.seed)
    load_weights(folder, model)
    if layout in BACKBONES:
        count = save_backbone(model, layout, output.parent)
        return [
            f"wrote {output}: {count} tensors, step {step}",
            f"load it with {how_to_load(config.model, layout, output)}",
        ]
    tensors = TENSORS[layout](model)
    header = {
        "format": "pt",
        "names": layout,
        "preset": config.preset,
        "step": str(step),
        "method": config.model.method,
        "licence": LICENCE,
        **header_of(EncoderSizes.of(config.model)),
    }
    part = output.with_name(output.name + ".part")
    files.write_tensors(part, tensors, header)
    part.rename(output)
    if layout == "hf":
        text = json.dumps(hf_config(config.model), indent=1)
        output.with_name("config.json").write_text(text + "\n")
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    return [
        f"wrote {output}: {len(tensors)} tensors, {millions:.1f} M numbers, step {step}",
        f"load it with {how_to_load(config.model, layout, output)}",
    ]
