"""Losses against a teacher's token features: cosine (DeepMIM-CLIP) and mean squared error.

Legend: B images, L patches, K visible patches, P width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from deepmim_kernels import masked_cosine
from torch import Tensor, nn

from deepmim_scale.batch import Batch, Masking, expect_shape
from deepmim_scale.image_format import IMAGENET, PixelStatistics
from deepmim_scale.images import normalize
from deepmim_scale.objectives.base import Objective, missing_teacher

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig


class FeatureTargets(NamedTuple):
    """Features of every token of the whole images; which patches count is known by ids."""

    features: Tensor
    ids_masked: Tensor


class FrozenTeacher(nn.Module):
    """A frozen network that sees whole images, normalized by its own statistics."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        tokens: Callable[[Tensor], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        num_prefix_tokens: int = 1,
        ours: PixelStatistics = IMAGENET,
    ) -> None:
        super().__init__()
        self.network, self.tokens, self.num_prefix_tokens = network, tokens, num_prefix_tokens
        ours_mean, ours_std, its_mean, its_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (*ours, mean, std)
        )
        # From our statistics to the teacher's in one multiplication and addition.
        self.register_buffer("scale", ours_std / its_std)
        self.register_buffer("shift", (ours_mean - its_mean) / its_std)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, prefix + L, P] of images [B, 3, H, W] normalized as `normalize` does."""
        return self.tokens(images * self.scale + self.shift)


class CosineObjective(Objective):
    """2 - 2 cos to the features [B, prefix + L, P] that a frozen teacher gives whole images."""

    def __init__(self, model: ModelConfig, teacher: FrozenTeacher | None) -> None:
        self._model, self._teacher = model, teacher
        self._num_prefix_tokens = teacher.num_prefix_tokens if teacher is not None else 1

    def prepare(self, batch: Batch, masking: Masking) -> FeatureTargets:
        """The teacher's features, or those that the batch brings."""
        features = batch.teacher
        if features is None:
            if self._teacher is None:
                raise missing_teacher(self._model.target, "features [B, L+1, P]")
            features = self._teacher(normalize(batch.images, self._model.pixel_statistics))
        tokens = self._num_prefix_tokens + self._model.num_patches
        shape = (len(batch.images), tokens, self._model.out_dim)
        expect_shape("teacher", features, "[B, L+1, P]", shape)
        return FeatureTargets(features, masking.ids_masked)

    def loss(
        self, name: str, predictions: Sequence[Tensor], targets: FeatureTargets, grad_scale: float
    ) -> Tensor:
        """As `deepmim_kernels.masked_cosine`."""
        return masked_cosine(
            predictions[0],
            targets.features,
            ids=targets.ids_masked,
            teacher_prefix_tokens=self._num_prefix_tokens,
            expected_grad_scale=grad_scale,
        )

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        if self._teacher is not None:
            self._teacher.to(device)


class SquaredErrorObjective(Objective):
    """Mean squared error to features [B, L, P] that a function makes of normalized images."""

    def __init__(
        self,
        make_features: Callable[[Tensor], Tensor],
        statistics: PixelStatistics = IMAGENET,
    ) -> None:
        self._make_features, self._statistics = make_features, statistics

    def prepare(self, batch: Batch, masking: Masking) -> Tensor:
        """Features [B, L-K, P] of the masked patches, fp32."""
        with torch.no_grad():
            images = normalize(batch.images, self._statistics)
            features = self._make_features(images).float()
        return features.gather(1, masking.ids_masked[..., None].expand(-1, -1, features.shape[-1]))

    def loss(
        self, name: str, predictions: Sequence[Tensor], targets: Tensor, grad_scale: float
    ) -> Tensor:
        """In fp32 at least, whatever autocast made of the prediction."""
        wide = torch.promote_types(predictions[0].dtype, torch.float32)
        return (predictions[0].to(wide) - targets).square().mean()


class LearningTeacher(Protocol):
    """A teacher that follows the trained model."""

    model: nn.Module
    weights: dict[str, Tensor]

    def latents(self, images: Tensor) -> Tensor:
        """Features [B, L, P] of normalized images."""
        ...

    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Learn from the trained weights, by their global names."""
        ...


class LearningObjective(SquaredErrorObjective):
    """Mean squared error to a teacher that learns after every step."""

    def __init__(self, teacher: LearningTeacher, statistics: PixelStatistics = IMAGENET) -> None:
        super().__init__(teacher.latents, statistics)
        self._teacher = teacher

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self._teacher.model.to(device)

    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """The teacher's turn."""
        self._teacher.update(parameters)

    def state(self) -> dict[str, Tensor]:
        """The teacher's weights."""
        return dict(self._teacher.weights)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, weight in self._teacher.weights.items():
            weight.copy_(state[name])
