"""Target `clip`: token features of a frozen CLIP image encoder, by cosine (DeepMIM-CLIP).

`--teacher` names an open_clip model, its folder, or a file with the default model's weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmim_scale.errors import UserError
from deepmim_scale.image_format import show_size
from deepmim_scale.json_file import read_json
from deepmim_scale.objectives.base import (
    Networks,
    ObjectiveSpec,
    TeacherSize,
    build_cosine,
    check_width,
    require_rgb,
)

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig, RunConfig

# OpenAI's weights need QuickGELU.
DEFAULT = "ViT-B-16-quickgelu"
# open_clip's own way to name a folder with open_clip_config.json in place of a built-in model.
LOCAL = "local-dir:"


def _name_and_weights(config: RunConfig) -> tuple[str, str]:
    teacher = config.model.teacher or DEFAULT
    if Path(teacher).is_file():
        return DEFAULT, teacher
    return teacher, config.teacher_weights


def _open_clip_folder() -> Path | None:
    """Where open_clip is installed; it is not imported, as that imports torch."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _config_file(name: str) -> Path | None:
    """The JSON with the sizes of a model."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL)) / "open_clip_config.json"
    folder = _open_clip_folder()
    return folder / "model_configs" / f"{name}.json" if folder else None


def _description(name: str) -> dict[str, Any]:
    """What open_clip's JSON says of a model; empty where there is none."""
    file = _config_file(name)
    content = read_json(file) if file is not None and file.is_file() else {}
    described = content.get("model_cfg", content)
    if not isinstance(described, dict) or not isinstance(described.get("vision_cfg", {}), dict):
        raise UserError(f"teacher={name}: {file} describes no vision_cfg; give another teacher")
    return described


def check_fit(name: str, size: int, patch: int, width: int, model: ModelConfig) -> None:
    """UserError unless the teacher's image size, patch size and features are the model's."""
    if (size, patch) != (model.img_size, model.patch_size):
        theirs, ours = (size // patch) ** 2 + 1, model.num_patches + 1
        raise UserError(
            f"teacher={name}: {theirs} tokens from image size {size} and patch size {patch}, the "
            f"model has {ours} from img_size={show_size(model.img_size)} and "
            f"patch_size={model.patch_size}; choose another teacher or --img-size {size} "
            f"--patch-size {patch}"
        )
    check_width(model, f"teacher={name}", width)


def teacher_size(model: ModelConfig) -> TeacherSize:
    """Sizes from open_clip's own description, those of ViT-B/16 where it has none."""
    name = DEFAULT if Path(model.teacher).is_file() else model.teacher or DEFAULT
    vision = _description(name).get("vision_cfg", {})
    depth, width = vision.get("layers", 12), vision.get("width", 768)
    return TeacherSize(
        depth if isinstance(depth, int) else 12,  # ResNets have a list; they are refused later
        width,
        model.num_patches + 1,
        vision.get("mlp_ratio", 4.0),
        model.teacher_dim,
    )


def _check_run(config: RunConfig, networks: Networks) -> None:
    if _open_clip_folder() is None:
        raise UserError(
            "target=clip: its teacher needs open_clip, which is not installed; "
            "pip install open_clip_torch"
        )
    name, _ = _name_and_weights(config)
    described = _description(name)
    vision = described.get("vision_cfg", {})
    # What is not said has open_clip's default; other kinds of networks are refused once built.
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    width = described.get("embed_dim")
    is_transformer = isinstance(vision.get("layers"), int) and "timm_model_name" not in vision
    if is_transformer and all(isinstance(n, int) and n > 0 for n in (size, patch, width)):
        check_fit(name, size, patch, int(width or 0), config.model)


def _load(config: RunConfig, networks: Networks) -> Any:
    from deepmim_scale.objectives.clip_teacher import load_teacher

    return load_teacher(*_name_and_weights(config), config.model)


SPEC = ObjectiveSpec(
    "clip",
    lambda model: model.teacher_dim,
    build_cosine,
    load_teacher=_load,
    check_run=_check_run,
    check_model=require_rgb,
    teacher_size=teacher_size,
)
