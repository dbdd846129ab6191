"""The targets by name. Adding one is a file beside these and a line here (or `register`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.objectives import clip, ema, hog, hybrid, pixels, timm_features
from deepmim_scale.objectives.base import Networks, Objective, ObjectiveSpec

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig

__all__ = [
    "OBJECTIVES",
    "Networks",
    "Objective",
    "ObjectiveSpec",
    "build_objective",
    "find_objective",
    "objective_of",
    "register",
]

OBJECTIVES: dict[str, ObjectiveSpec] = {}
# Older names of targets, in flags and in files.
ALIASES = {"cosine": "clip"}
HYBRID = hybrid.SPEC.name


def register(spec: ObjectiveSpec) -> None:
    """Make a target known by its name."""
    OBJECTIVES[spec.name] = spec


for _module in (pixels, clip, hybrid, hog, ema, timm_features):
    register(_module.SPEC)


def find_objective(target: str) -> ObjectiveSpec:
    """The spec of NAME or NAME:ARGUMENT; ValueError lists the names there are."""
    name, colon, argument = target.partition(":")
    spec = OBJECTIVES.get(name)
    if spec is None or bool(colon and argument) != spec.takes_argument:
        names = [f"{s.name}:NAME" if s.takes_argument else s.name for s in OBJECTIVES.values()]
        raise ValueError(f"target={target}: unknown; choose one of {', '.join(names)}")
    return spec


def objective_of(model: ModelConfig) -> ObjectiveSpec:
    """The spec of a model's target."""
    return find_objective(model.target)


def build_objective(model: ModelConfig, teacher: object = None) -> Objective:
    """Targets and losses of a model; without `teacher` a batch must bring its teacher's output."""
    return objective_of(model).build(model, teacher)
