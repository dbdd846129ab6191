"""Target `clip`: token features of a frozen CLIP image encoder, by cosine (DeepMIM-CLIP).

`--teacher` names an open_clip model, its folder, or a file with the default model's weights.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmim_scale.errors import UserError
from deepmim_scale.objectives.base import Networks, ObjectiveSpec, TeacherSize, build_cosine

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


def teacher_size(model: ModelConfig) -> TeacherSize:
    """Sizes from open_clip's own description, those of ViT-B/16 where it has none."""
    file = _config_file(model.teacher or DEFAULT)
    content = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    vision = content.get("model_cfg", content).get("vision_cfg", {})
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


def _load(config: RunConfig, networks: Networks) -> Any:
    from deepmim_scale.objectives.clip_teacher import load_teacher

    return load_teacher(*_name_and_weights(config), config.model)


SPEC = ObjectiveSpec(
    "clip",
    lambda model: model.teacher_dim,
    build_cosine,
    load_teacher=_load,
    check_run=_check_run,
    teacher_size=teacher_size,
)
