"""The frozen CLIP image encoder whose token features DeepMIM-CLIP predicts (loss cosine).

Legend: B images, S image side, L patches, P teacher width.
Source: OliverRensu/DeepMIM, forward_loss; it rebuilds the network that open_clip has.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.images import IMAGENET_MEAN, IMAGENET_STD
from deepmim_scale.objectives import require_open_clip

# open_clip's own way to name a folder with open_clip_config.json in place of a built-in model.
LOCAL = "local-dir:"


class Teacher(nn.Module):
    """Token features of whole images, without gradients."""

    scale: Tensor
    shift: Tensor

    def __init__(self, visual: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        visual.output_tokens = True
        self.visual = visual
        ours_mean, ours_std, mean_, std_ = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
        )
        # From ImageNet's statistics to the teacher's in one multiplication and addition.
        self.register_buffer("scale", ours_std / std_)
        self.register_buffer("shift", (ours_mean - mean_) / std_)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features [B, L+1, P], CLS first, of images [B, 3, S, S] normalized as `normalize` does.

        All tokens pass the last LayerNorm and the projection, not only CLS as in CLIP itself. The
        mask's `noise` changes nothing: the teacher sees whole images.
        """
        pooled, tokens = self.visual(images * self.scale + self.shift)
        return torch.cat([pooled.unsqueeze(1), tokens @ self.visual.proj], dim=1)


def load_teacher(
    name: str, weights: str, config: ModelConfig, device: torch.device | str = "cpu"
) -> Teacher:
    """The open_clip model `name` (or local-dir:FOLDER) with weights from a tag or a file.

    A file is a state dict with `visual.` names, of torch.save or safetensors. UserError if there
    is no such model, its tokens do not fit `config`, or the weights cannot be loaded.
    """
    require_open_clip()
    import open_clip

    if not name.startswith(LOCAL) and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.0)
        raise UserError(f"teacher={name}: open_clip has no such model; did you mean {near[0]}?")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags and not Path(weights).is_file():
        known = f"a tag of {name} ({', '.join(tags)})" if tags else f"a tag ({name} has none)"
        raise UserError(f"teacher_weights={weights}: must be a file or {known}")
    try:
        with _quiet():
            visual = open_clip.create_model(name, load_weights=False, pretrained_text=False).visual
    except Exception as error:  # open_clip builds many kinds of models and fails in many ways
        raise UserError(f"teacher={name}: cannot be built ({_line(error)})") from None
    _check(visual, name, config)
    tag = {} if Path(weights).is_file() else open_clip.get_pretrained_cfg(name, weights)
    if tag.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        raise UserError(
            f"teacher={name}: weights {weights} need QuickGELU; use --teacher {name}-quickgelu"
        )
    try:
        file = open_clip.download_pretrained(tag) if tag else weights
        state = open_clip.factory.load_state_dict(file, weights_only=True)
        part = "visual."
        visual.load_state_dict(
            {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
        )
    except Exception as error:  # nor is there an end to what downloads and files can raise
        raise UserError(
            f"teacher_weights={weights}: cannot be loaded ({_line(error)}); "
            f"give a local file with the state dict of {name}"
        ) from None
    mean, std = tag.get("mean", visual.image_mean), tag.get("std", visual.image_std)
    return Teacher(visual, mean, std).to(device)


def _check(visual: Any, name: str, config: ModelConfig) -> None:
    if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool is not None:
        raise UserError(
            f"teacher={name}: must be a vision transformer with a class token; "
            "use ViT-B-16-quickgelu"
        )
    size, patch = visual.image_size[0], visual.patch_size[0]
    if (size, patch) != (config.img_size, config.patch_size):
        theirs, ours = (size // patch) ** 2 + 1, config.num_patches + 1
        raise UserError(
            f"teacher={name}: {theirs} tokens from image size {size} and patch size {patch}, the "
            f"model has {ours} from img_size={config.img_size} and patch_size={config.patch_size}; "
            f"choose another teacher or --img-size {size} --patch-size {patch}"
        )
    if visual.output_dim != config.teacher_dim:
        raise UserError(
            f"teacher_dim={config.teacher_dim}: the features of teacher={name} are "
            f"{visual.output_dim} wide; use --teacher-dim {visual.output_dim}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # create_model warns of random weights, which are replaced right after.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]
