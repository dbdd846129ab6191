"""Target `ema`: latents of whole images by a moving average of the trained encoder itself.

The teacher's last tokens, each normalized over its width, are predicted at the masked patches after
every tap (as data2vec, Baevski et al., ICML 2022, with one layer). After each step the teacher's
weights move towards the trained ones: t <- decay * t + (1 - decay) * s.
Legend: B images, L patches, D encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepmim_scale.objectives.base import Objective, ObjectiveSpec, TeacherSize, missing_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from deepmim_scale.config import ModelConfig


class Ema:
    """The averaged encoder; the frozen position table is no weight of it."""

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self._decay = model.eval().requires_grad_(False), decay
        names = dict(model.named_parameters())
        outside = ("decoders.", "carries.", "pos_embed")
        self.weights = {n: w for n, w in names.items() if not n.startswith(outside)}

    def latents(self, images: Tensor) -> Tensor:
        """Normalized tokens [B, L, D] after the last block, of whole images."""
        from torch.nn import functional

        *_, tokens = self.model.features(images)
        return functional.layer_norm(tokens[:, 1:].float(), tokens.shape[-1:])

    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move towards the trained weights."""
        for name, weight in self.weights.items():
            weight.lerp_(parameters[name].detach().to(weight.dtype), 1 - self._decay)


def _build(model: ModelConfig, teacher: Ema | None) -> Objective:
    from deepmim_scale.objectives.features import LearningObjective, SquaredErrorObjective

    def nothing(images: Tensor) -> Tensor:
        raise missing_teacher(model.target, "latents [B, L, D]")

    if teacher is None:
        return SquaredErrorObjective(nothing)
    return LearningObjective(teacher, model.pixel_statistics)


def _size(model: ModelConfig) -> TeacherSize:
    return TeacherSize(model.depth, model.embed_dim, model.num_patches + 1, model.mlp_ratio)


SPEC = ObjectiveSpec(
    "ema",
    lambda model: model.embed_dim,
    _build,
    load_teacher=lambda run, networks: Ema(networks.fresh(run), run.ema_decay),
    teacher_size=_size,
    whole_model=True,
)
