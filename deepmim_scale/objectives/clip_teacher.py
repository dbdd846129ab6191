"""The frozen CLIP image encoder whose token features DeepMIM-CLIP predicts (target clip).

Legend: B images, S image side, L patches, P teacher width.
Source: OliverRensu/DeepMIM, forward_loss; it rebuilds the network that open_clip has.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepmim_scale.errors import UserError
from deepmim_scale.objectives.base import one_line
from deepmim_scale.objectives.clip import LOCAL, check_fit
from deepmim_scale.objectives.features import FrozenTeacher

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig


def _token_features(visual: Any, images: Tensor) -> Tensor:
    """Features [B, L+1, P], CLS first: all tokens pass LayerNorm and projection, as CLS in CLIP."""
    pooled, tokens = visual(images)
    return torch.cat([pooled.unsqueeze(1), tokens @ visual.proj], dim=1)


def load_teacher(
    name: str, weights: str, config: ModelConfig, device: torch.device | str = "cpu"
) -> FrozenTeacher:
    """The open_clip model `name` (or local-dir:FOLDER) with weights from a tag or a file.

    A file is a state dict with `visual.` names, of torch.save or safetensors. UserError if there
    is no such model, its tokens do not fit `config`, or the weights cannot be loaded.
    """
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
        raise UserError(f"teacher={name}: cannot be built ({one_line(error)})") from None
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
            f"teacher_weights={weights}: cannot be loaded ({one_line(error)}); "
            f"give a local file with the state dict of {name}"
        ) from None
    mean, std = tag.get("mean", visual.image_mean), tag.get("std", visual.image_std)
    visual.output_tokens = True
    ours = config.pixel_statistics
    return FrozenTeacher(visual, partial(_token_features, visual), mean, std, ours=ours).to(device)


def _check(visual: Any, name: str, config: ModelConfig) -> None:
    if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool is not None:
        raise UserError(
            f"teacher={name}: must be a vision transformer with a class token; "
            "use ViT-B-16-quickgelu"
        )
    check_fit(name, visual.image_size[0], visual.patch_size[0], visual.output_dim, config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # create_model warns of random weights, which are replaced right after.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
