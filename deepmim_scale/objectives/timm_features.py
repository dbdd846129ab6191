"""Target `timm:NAME`: token features of any frozen timm vision transformer, by cosine.

The weights come from a local file (`--teacher FILE`), so clusters without internet can use it.
The network is made for the run's image size; its patch size and the file's must be the run's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmim_scale.errors import UserError
from deepmim_scale.objectives import base
from deepmim_scale.objectives.base import Networks, ObjectiveSpec, TeacherSize

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig, RunConfig


def _create(model: ModelConfig, device: str) -> Any:
    """The teacher's network, without a head."""
    import timm
    import torch

    name, side = model.target.partition(":")[2], model.patch_size
    try:
        with torch.device(device):
            teacher: Any = timm.create_model(name, num_classes=0, img_size=model.img_size)
        if teacher.num_prefix_tokens >= 0 and teacher.patch_embed.patch_size == (side, side):
            return teacher
        reason = f"its patch size is {teacher.patch_embed.patch_size}"
    except Exception as error:  # timm refuses names, tags and image sizes in many ways
        reason = base.one_line(error)
    rule = f"must be a timm vision transformer for img_size={model.img_size}, patch_size={side}"
    raise UserError(f"target={model.target}: {rule} ({reason}); see timm.list_models()")


@cache  # the planner asks for every cut
def _size(model: ModelConfig) -> TeacherSize:
    vit = _create(model, "meta")
    return TeacherSize(len(vit.blocks), vit.embed_dim, vit.num_prefix_tokens + model.num_patches)


def _check_run(config: RunConfig, networks: Networks) -> None:
    if not Path(config.model.teacher).is_file():
        rule = f"target {config.model.target} needs that model's weights; give --teacher FILE"
        raise UserError(f"teacher={config.model.teacher}: {rule}")


def _load(config: RunConfig, networks: Networks) -> Any:
    from timm.models import load_state_dict

    from deepmim_scale.objectives.features import FrozenTeacher

    model, file, teacher = config.model, config.model.teacher, _create(config.model, "cpu")
    base.check_width(model, model.target, teacher.num_features)
    try:
        state = load_state_dict(file, use_ema=False, weights_only=True)
        teacher.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    except Exception as error:  # files can be wrong in many ways
        rule = (
            f"no weights of {model.target} for img_size={model.img_size} ({base.one_line(error)})"
        )
        raise UserError(f"teacher={file}: {rule}; save that model's state dict") from None
    its, ours = teacher.pretrained_cfg, model.pixel_statistics
    numbers = (its["mean"], its["std"], teacher.num_prefix_tokens, ours)
    return FrozenTeacher(teacher, teacher.forward_features, *numbers)


SPEC = ObjectiveSpec(
    "timm",
    lambda model: model.teacher_dim,
    base.build_cosine,
    load_teacher=_load,
    check_run=_check_run,
    check_model=base.require_rgb,
    teacher_size=_size,
    takes_argument=True,
)
