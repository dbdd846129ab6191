"""Encoders, decoders and the stages that hold them."""

from deepmim_scale.config import ModelConfig
from deepmim_scale.models.classifier import build_classifier, resize_position_table
from deepmim_scale.models.model import Model, Output, build_model, local_backward
from deepmim_scale.models.stage import Stage

__all__ = [
    "Model",
    "ModelConfig",
    "Output",
    "Stage",
    "build_classifier",
    "build_model",
    "local_backward",
    "resize_position_table",
]
