"""Target `timm:NAME`: token features of any frozen timm vision transformer, by cosine.

The weights come from a local file (`--teacher FILE`), so clusters without internet can use it.
Legend: B images, L patches, P width of a feature.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmim_scale.errors import UserError
from deepmim_scale.objectives.base import Networks, Objective, ObjectiveSpec, TeacherSize

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig, RunConfig


def _create(model: ModelConfig, device: str) -> Any:
    """The teacher's network, without a head."""
    import timm
    import torch

    name = model.target.partition(":")[2]
    if not timm.is_model(name):
        raise UserError(f"target={model.target}: timm has no such model; see timm.list_models()")
    with torch.device(device):
        teacher = timm.create_model(name, num_classes=0, img_size=model.img_size)
    if not hasattr(teacher, "blocks") or not hasattr(teacher, "num_prefix_tokens"):
        raise UserError(
            f"target={model.target}: must be a vision transformer; e.g. timm:vit_base_patch16_224"
        )
    return teacher


def _size(model: ModelConfig) -> TeacherSize:
    teacher = _create(model, "meta")
    return TeacherSize(len(teacher.blocks), teacher.embed_dim, teacher.pos_embed.shape[1])


def _check_run(config: RunConfig, networks: Networks) -> None:
    if not Path(config.model.teacher).is_file():
        raise UserError(
            f"teacher={config.model.teacher}: target {config.model.target} needs a file with that "
            "model's weights; give --teacher FILE"
        )


def _load(config: RunConfig, networks: Networks) -> Any:
    from timm.models import load_state_dict

    from deepmim_scale.objectives.features import FrozenTeacher

    model, teacher = config.model, _create(config.model, "cpu")
    grid, width = teacher.patch_embed.grid_size, teacher.num_features
    if grid != (model.grid_size, model.grid_size):
        raise UserError(
            f"target={model.target}: has {grid[0]} x {grid[1]} patches, the model {model.grid_size}"
            f" x {model.grid_size}; choose --patch-size {model.img_size // grid[0]} or another one"
        )
    if width != model.teacher_dim:
        raise UserError(
            f"teacher_dim={model.teacher_dim}: features of target={model.target} are {width} wide; "
            f"use --teacher-dim {width}"
        )
    try:
        state = load_state_dict(model.teacher, use_ema=False, weights_only=True)
        teacher.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    except Exception as error:  # files can be wrong in many ways
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"teacher={model.teacher}: no weights of {model.target} ({reason})"
        ) from None
    return FrozenTeacher(
        teacher,
        teacher.forward_features,
        teacher.pretrained_cfg["mean"],
        teacher.pretrained_cfg["std"],
        teacher.num_prefix_tokens,
    )


def _build(model: ModelConfig, teacher: Any) -> Objective:
    from deepmim_scale.objectives.features import CosineObjective

    return CosineObjective(model, teacher)


SPEC = ObjectiveSpec(
    "timm",
    lambda model: model.teacher_dim,
    _build,
    load_teacher=_load,
    check_run=_check_run,
    teacher_size=_size,
    takes_argument=True,
)
