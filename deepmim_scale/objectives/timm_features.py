"""Target `timm:NAME`: token features of any frozen timm vision transformer, by cosine.

The weights come from a local file (`--teacher FILE`), so clusters without internet can use it.
The network is made for the run's image size; its patch size and the file's must be the run's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmim_scale.errors import UserError
from deepmim_scale.objectives.base import Networks, ObjectiveSpec, TeacherSize, build_cosine

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig, RunConfig


def _create(model: ModelConfig, device: str) -> Any:
    """The teacher's network, without a head."""
    import timm
    import torch

    name = model.target.partition(":")[2]
    if not timm.is_model(name):
        raise UserError(f"target={model.target}: timm has no such model; see timm.list_models()")
    try:
        with torch.device(device):
            teacher = timm.create_model(name, num_classes=0, img_size=model.img_size)
    except Exception as error:  # architectures refuse a tag or an image size in many ways
        raise UserError(
            f"target={model.target}: timm cannot build it for img_size={model.img_size} "
            f"({_line(error)}); choose a vision transformer"
        ) from None
    found = getattr(getattr(teacher, "patch_embed", None), "patch_size", None)
    if found != (model.patch_size, model.patch_size) or not hasattr(teacher, "num_prefix_tokens"):
        raise UserError(
            f"target={model.target}: must be a vision transformer with "
            f"patch_size={model.patch_size}, has {found}; choose another one or another --patch-size"
        )
    return teacher


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:280]


@cache  # the planner asks for every cut
def _size(model: ModelConfig) -> TeacherSize:
    teacher = _create(model, "meta")
    num_tokens = teacher.num_prefix_tokens + model.num_patches
    return TeacherSize(len(teacher.blocks), teacher.embed_dim, num_tokens)


def _check_run(config: RunConfig, networks: Networks) -> None:
    if not Path(config.model.teacher).is_file():
        raise UserError(
            f"teacher={config.model.teacher}: target {config.model.target} needs a file with that "
            "model's weights; give --teacher FILE"
        )


def _load(config: RunConfig, networks: Networks) -> Any:
    from timm.models import load_state_dict

    from deepmim_scale.objectives.features import FrozenTeacher

    model, file, teacher = config.model, config.model.teacher, _create(config.model, "cpu")
    if teacher.num_features != model.teacher_dim:
        width = teacher.num_features
        raise UserError(
            f"teacher_dim={model.teacher_dim}: features of {model.target} are {width} wide; "
            f"use --teacher-dim {width}"
        )
    try:
        state = load_state_dict(file, use_ema=False, weights_only=True)
        teacher.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    except Exception as error:  # files can be wrong in many ways
        raise UserError(
            f"teacher={file}: no weights of {model.target} for img_size={model.img_size} "
            f"({_line(error)}); save that model's state dict"
        ) from None
    mean, std = (teacher.pretrained_cfg[key] for key in ("mean", "std"))
    return FrozenTeacher(teacher, teacher.forward_features, mean, std, teacher.num_prefix_tokens)


SPEC = ObjectiveSpec(
    "timm",
    lambda model: model.teacher_dim,
    build_cosine,
    load_teacher=_load,
    check_run=_check_run,
    teacher_size=_size,
    takes_argument=True,
)
