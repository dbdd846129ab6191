"""The encoder in any file, under timm's names.

Files are runs, exports, official releases of MAE, DeepMIM and MIRL (torch layout), timm's ViTs, and
Hugging Face's ViT and ViTMAE.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepmim_scale.checkpoint import networks
from deepmim_scale.checkpoint.export import HF_BLOCK, timm_tensors
from deepmim_scale.checkpoint.files import BEST, LAST
from deepmim_scale.checkpoint.sizes import CLASSES, EncoderSizes, sizes_in
from deepmim_scale.errors import UserError
from deepmim_scale.runs.folder import CHECKPOINTS, CONFIG, fine_tuned, load_run_config

# Heads of this width are assumed where nothing tells their number: timm's ViTs have them.
_HEAD_WIDTH = 64
_OURS = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|fc_norm|head)\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
# Of pre-training: decoders, and MIRL's norms between its segments.
_LEFT_OUT = re.compile(
    r"mask_token|decoder|decoders\.|carries\.|norm_low|norm\d|vit\.pooler|pooler|classifier"
)
_WRAPPERS = ("model", "state_dict", "module")


@dataclass(frozen=True)
class Encoder:
    """Weights of an encoder, perhaps with a head, and where they come from."""

    tensors: dict[str, Tensor]
    """By the names of timm's VisionTransformer."""
    sizes: EncoderSizes
    source: str
    """For messages."""
    classes: tuple[str, ...] = ()
    """What the head's rows stand for, if the file tells."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed or left out, a line each."""

    @property
    def head(self) -> int:
        """Classes of the head; 0 without one."""
        return len(self.tensors["head.weight"]) if "head.weight" in self.tensors else 0

    @property
    def pools_mean(self) -> bool:
        """Whether the head of a fine-tuned model reads the mean of the patches."""
        return "fc_norm.weight" in self.tensors


def load_encoder(path: str, from_step: str = "") -> Encoder:
    """The encoder of a run, of one of its checkpoints, of a fine-tuned run (its best), or a file.

    UserError if there is none, or it is no plain ViT.
    """
    place = Path(path)
    if place.is_file():
        if from_step:
            raise UserError(f"from={from_step}: {path} is a file; give its run's folder")
        return _of_file(place)
    if place.parent.name == CHECKPOINTS and place.is_dir() and not from_step:
        return _of_run(str(place.parents[1]), place.name)
    if not place.is_dir():
        raise UserError(f"{path}: does not exist; give a run, a checkpoint or a file of weights")
    if fine_tuned(path):
        if from_step:
            raise UserError(
                f"from={from_step}: {path} is a fine-tuned run; give {path}/{BEST} or {LAST}"
            )
        if not (place / BEST).is_file():
            raise UserError(f"{path}: has no {BEST} yet; let the run evaluate once")
        return _of_file(place / BEST)
    return _of_run(path, from_step)


def is_run(path: str) -> tuple[str, str] | None:
    """Folder and step of a run of pre-training or of a checkpoint of one; None for all else."""
    place = Path(path)
    run, step = path, ""
    if place.parent.name == CHECKPOINTS:
        run, step = str(place.parents[1]), place.name
    return (run, step) if (Path(run) / CONFIG).is_file() and not fine_tuned(run) else None


def _of_run(run: str, from_step: str) -> Encoder:
    config = load_run_config(run).model
    tensors = timm_tensors(networks.trained(run, from_step))
    return Encoder(tensors, EncoderSizes.of(config), run)


def _of_file(path: Path) -> Encoder:
    content, header = _read(path)
    names, note = _translate(content), tuple[str, ...]()
    strange = sorted(n for n in names if not _OURS.fullmatch(n) and not _LEFT_OUT.match(n))
    tensors = {name: value for name, value in names.items() if _OURS.fullmatch(name)}
    if strange:
        raise UserError(f"{path}: {strange[0]}: not part of a plain ViT; give an encoder of one")
    missing = [n for n in ("cls_token", "pos_embed", "patch_embed.proj.weight") if n not in tensors]
    if missing or "blocks.0.attn.qkv.weight" not in tensors:
        absent = [*missing, "blocks.0.attn.qkv.weight"][0]
        raise UserError(f"{path}: {absent}: missing; give the weights of a ViT")
    told, sizes = sizes_in(header), sizes_of(tensors)
    if told is not None:
        sizes = told
    elif sizes.embed_dim % _HEAD_WIDTH == 0:
        sizes = replace(sizes, num_heads=sizes.embed_dim // _HEAD_WIDTH)
        note = (f"{path}: tells no number of heads; assumed {sizes.num_heads} of {_HEAD_WIDTH}",)
    classes = tuple(json.loads(header.get(CLASSES, "[]")))
    return Encoder(tensors, sizes, str(path), classes, note)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if path.suffix == ".pdparams":
        raise UserError(f"{path}: is Paddle's; convert it by the release's util/paddle2pytorch.py")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        # Official checkpoints keep their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0][:100]
        raise UserError(
            f"{path}: cannot be read ({reason}); give a .safetensors, or a state dict of torch.save"
        ) from None
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    found = {n: v for n, v in content.items() if isinstance(v, Tensor)} if _is_dict(content) else {}
    if not found:
        raise UserError(f"{path}: holds no weights by name; give a state dict")
    return found, {}


def _is_dict(content: Any) -> bool:
    return isinstance(content, dict)


def sizes_of(tensors: Mapping[str, Tensor]) -> EncoderSizes:
    """Sizes that the shapes of timm's tensors tell; the number of heads is not among them."""
    patch = tensors["patch_embed.proj.weight"]
    width, channels, side = patch.shape[:3]
    blocks = {int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")}
    grid = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    hidden = len(tensors["blocks.0.mlp.fc1.weight"])
    return EncoderSizes(grid * side, side, width, max(blocks) + 1, 0, hidden / width, channels)


_HF_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    "layernorm.": "norm.",
}
_ROLES = ("query", "key", "value")


def _translate(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for the hub's names of a ViT or ViTMAE; others stay as they are."""
    plain = {name.removeprefix("module.").removeprefix("vit."): v for name, v in content.items()}
    if "embeddings.cls_token" not in plain:
        return plain
    result: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in plain.items():
        for theirs, ours in _HF_OUTSIDE.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        for ours, theirs in HF_BLOCK.items():
            name = name.replace(theirs, ours)
        role = re.search(r"\.attention\.attention\.(query|key|value)\.", name)
        if role:
            whole = name.replace(role[0], ".attn.qkv.")
            thirds.setdefault(whole, {})[role[1]] = value
        else:
            result[name] = value
    for name, parts in thirds.items():
        result[name] = torch.cat([parts[role] for role in _ROLES])
    return result
