"""Target `pixel`: the masked patches themselves, normalized or as they are (MAE, DeepMIM, MIRL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from deepmim_scale.objectives.base import Objective, ObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor

    from deepmim_scale.batch import Batch, Masking
    from deepmim_scale.config import ModelConfig


def num_pixels(model: ModelConfig) -> int:
    """Values of a patch."""
    return model.in_chans * model.patch_size**2


class PixelTargets(NamedTuple):
    """The kernel reads patches from the images where they are: nothing is copied."""

    images: Tensor
    ids_masked: Tensor
    mix: Tensor | None = None
    """Reconstructions [B, L-K, P] that hybrid targets mix in."""


class PixelObjective(Objective):
    """Mean squared error, of one prediction or of the sum of a pair's two."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def prepare(self, batch: Batch, masking: Masking) -> PixelTargets:
        """The images and which of their patches are masked."""
        return PixelTargets(batch.images, masking.ids_masked)

    def loss(
        self, name: str, predictions: Sequence[Tensor], targets: PixelTargets, grad_scale: float
    ) -> Tensor:
        """As `deepmim_kernels.masked_mse`."""
        return self.mixed_loss(predictions, targets, grad_scale, 1.0)

    def mixed_loss(
        self,
        predictions: Sequence[Tensor],
        targets: PixelTargets,
        grad_scale: float,
        mix_alpha: float,
    ) -> Tensor:
        """The loss against mix_alpha * pixels + (1 - mix_alpha) * targets.mix."""
        from deepmim_kernels import masked_mse

        from deepmim_scale.images import pixel_scale

        first, *second = predictions
        return masked_mse(
            first,
            targets.images,
            ids=targets.ids_masked,
            patch_size=self._model.patch_size,
            norm_pix=self._model.norm_pix,
            paired_pred=second[0] if second else None,
            mix_target=targets.mix if mix_alpha < 1 else None,
            mix_alpha=mix_alpha,
            expected_grad_scale=grad_scale,
            **pixel_scale(targets.images, self._model.pixel_statistics),
        )


def _build(model: ModelConfig, teacher: object) -> Objective:
    return PixelObjective(model)


SPEC = ObjectiveSpec("pixel", num_pixels, _build, is_pixels=True, sums_pairs=True)
