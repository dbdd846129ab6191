"""The frozen network that a run learns from: CLIP for loss cosine, an MAE of ours for hybrid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.config import ModelConfig, RunConfig, even_alphas, validated
from deepmim_scale.errors import UserError
from deepmim_scale.objectives import require_open_clip
from deepmim_scale.runs.folder import load_run_config

if TYPE_CHECKING:
    from torch import nn

# What makes two models predict the same patches in the same space.
SHARED = ("loss", "img_size", "patch_size", "in_chans", "norm_pix", "mask_ratio")


def check_teacher(config: RunConfig) -> RunConfig:
    """`config` with its hybrid targets spelled out, without torch; UserError if they cannot be.

    Hybrid targets go from x_hat at the first tap evenly to raw pixels at the last by default.
    """
    if config.model.loss == "cosine":
        require_open_clip()
    if not config.hybrid:
        return config
    ours, theirs = config.model, load_run_config(config.hybrid).model
    if theirs.method != "mae":
        raise UserError(
            f"hybrid={config.hybrid}: a run of method {theirs.method}; give one of method mae"
        )
    for key in SHARED:
        if getattr(theirs, key) != getattr(ours, key):
            raise UserError(
                f"hybrid={config.hybrid}: has {key}={getattr(theirs, key)}, this run "
                f"{key}={getattr(ours, key)}; they must be equal"
            )
    alphas = ours.hybrid_alphas or even_alphas(len(ours.taps))
    fields = ours.model_dump() | {"hybrid_alphas": alphas}
    return config.model_copy(update={"model": validated(lambda: ModelConfig(**fields))})


def build_teacher(config: RunConfig) -> nn.Module | None:
    """What gives a micro-batch's targets from (images, noise), on the CPU; None for raw pixels."""
    if config.model.loss == "cosine":
        from deepmim_scale.objectives.clip import load_teacher

        return load_teacher(config.teacher, config.teacher_weights, config.model)
    if not config.hybrid:
        return None
    from deepmim_scale.checkpoint.files import resolve
    from deepmim_scale.checkpoint.save import load_weights
    from deepmim_scale.models import build_model
    from deepmim_scale.objectives.hybrid import Generator

    model = build_model(load_run_config(config.hybrid).model)
    load_weights(resolve(config.hybrid), model)
    return Generator(model)
