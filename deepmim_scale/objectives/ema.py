"""Target `ema`: latents of whole images by a moving average of the trained encoder itself.

The teacher's last tokens, each normalized over its width, are predicted at the masked patches after
every tap (as data2vec, Baevski et al., ICML 2022, with one layer). After each step the teacher's
weights move towards the trained ones: t <- decay * t + (1 - decay) * s.
Legend: B images, L patches, D encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepmim_scale.objectives.base import (
    Networks,
    Objective,
    ObjectiveSpec,
    TeacherSize,
    missing_teacher,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deepmim_scale.config import ModelConfig, RunConfig


class Teacher:
    """The averaged encoder."""

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = model.eval().requires_grad_(False), decay
        self.weights = {
            name: weight
            for name, weight in model.named_parameters()
            if not name.startswith(("decoders.", "carries.", "pos_embed"))
        }

    def latents(self, images: Tensor) -> Tensor:
        """Normalized tokens [B, L, D] after the last block, of whole images."""
        from torch.nn import functional

        *_, tokens = self.model.features(images)
        return functional.layer_norm(tokens[:, 1:].float(), tokens.shape[-1:])


def build(model: ModelConfig, teacher: Teacher | None) -> Objective:
    """Squared error to the teacher's latents."""
    from deepmim_scale.objectives.features import SquaredErrorObjective

    class EmaObjective(SquaredErrorObjective):
        """Its teacher learns after every step."""

        def to(self, device: torch.device) -> None:
            if teacher is not None:
                teacher.model.to(device)

        def after_step(self, parameters: Mapping[str, Tensor]) -> None:
            for name, weight in teacher.weights.items() if teacher is not None else ():
                weight.lerp_(parameters[name].detach().to(weight.dtype), 1 - teacher.decay)

        def state(self) -> dict[str, Tensor]:
            return dict(teacher.weights) if teacher is not None else {}

        def load_state(self, state: Mapping[str, Tensor]) -> None:
            for name, weight in teacher.weights.items() if teacher is not None else ():
                weight.copy_(state[name])

    def latents(images: Tensor) -> Tensor:
        if teacher is None:
            raise missing_teacher(SPEC.name, "latents [B, L, D]")
        return teacher.latents(images)

    return EmaObjective(latents)


def _load(config: RunConfig, networks: Networks) -> Teacher:
    return Teacher(networks.fresh(config), config.ema_decay)


SPEC = ObjectiveSpec(
    "ema",
    lambda model: model.embed_dim,
    build,
    load_teacher=_load,
    teacher_size=lambda model: TeacherSize(
        model.depth, model.embed_dim, model.num_patches + 1, model.mlp_ratio
    ),
    whole_model=True,
)
