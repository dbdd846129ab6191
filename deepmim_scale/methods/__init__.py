"""The methods by name. Adding one is a file beside these and a line here (or `register`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.methods.base import Loss, Method
from deepmim_scale.methods.deepmim import DeepMim
from deepmim_scale.methods.mae import Mae
from deepmim_scale.methods.mirl import Mirl

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig

__all__ = ["METHODS", "Loss", "Method", "decoder_names", "losses_of", "method_of", "register"]

METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name."""
    METHODS[method.name] = method


for _method in (Mae(), DeepMim(), Mirl()):
    register(_method)


def method_of(model: ModelConfig) -> Method:
    """The method of a model."""
    return METHODS[model.method]


def decoder_names(model: ModelConfig) -> dict[int, str]:
    """Block number (from 1) -> name of the decoder after it."""
    return dict(zip(model.taps, method_of(model).decoder_names(model), strict=True))


def losses_of(model: ModelConfig) -> dict[str, Loss]:
    """Every term of the total loss by its name, in order."""
    return {loss.name: loss for loss in method_of(model).losses(model)}
