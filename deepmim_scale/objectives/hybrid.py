"""Target `hybrid`: pixels x mixed with the reconstruction x_hat of a frozen MAE (DeepMIM).

A tap's target is a * x + (1 - a) * x_hat (DeepMIM, WACV 2025). The paper's space of this mixture is
not published; ours is the one that the loss compares in: patch-normalized with norm_pix.
Legend: B images, L patches, K visible patches, P pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deepmim_scale.errors import UserError
from deepmim_scale.methods import losses_of, method_of
from deepmim_scale.methods.base import require
from deepmim_scale.objectives.base import Networks, Objective, ObjectiveSpec, missing_teacher
from deepmim_scale.objectives.pixels import PixelObjective, PixelTargets, num_pixels

if TYPE_CHECKING:
    from torch import Tensor

    from deepmim_scale.batch import Batch, Masking
    from deepmim_scale.config import ModelConfig, RunConfig

# What makes two models predict the same patches in the same space.
_SHARED = (
    "img_size",
    "patch_size",
    "in_chans",
    "pixel_bits",
    "pixel_mean",
    "pixel_std",
    "norm_pix",
    "mask_ratio",
)
_GENERATOR = "mae"


class HybridObjective(Objective):
    """PixelObjective against targets that a frozen generator shares in."""

    def __init__(self, model: ModelConfig, generator: Any) -> None:
        self._pixels, self._generator = PixelObjective(model), generator
        self._width = num_pixels(model)
        self._alphas = dict(zip(losses_of(model), model.mix_alphas, strict=True))

    def prepare(self, batch: Batch, masking: Masking) -> PixelTargets:
        """Images, mask and the generator's x_hat [B, L-K, P] under the same mask."""
        from deepmim_scale.batch import expect_shape

        mix = batch.teacher
        if mix is None:
            if self._generator is None:
                raise missing_teacher(SPEC.name, "a reconstruction [B, L-K, P]")
            mix = self._generator.reconstruct(batch.images, batch.noise)
        shape = (*masking.ids_masked.shape, self._width)
        expect_shape("teacher", mix, "[B, L-K, P]", shape)
        return self._pixels.prepare(batch, masking)._replace(mix=mix)

    def loss(
        self, name: str, predictions: Sequence[Tensor], targets: PixelTargets, grad_scale: float
    ) -> Tensor:
        """With the tap's own share of pixels."""
        return self._pixels.mixed_loss(predictions, targets, grad_scale, self._alphas[name])

    def to(self, device: Any) -> None:
        """Move the generator."""
        if self._generator is not None:
            self._generator.to(device)


def _check_model(model: ModelConfig) -> None:
    alphas = ",".join(f"{alpha:g}" for alpha in model.mix_alphas)
    # Shares of a tap are defined where each tap has a loss of its own to mix in.
    require(
        method_of(model).free_taps,
        "hybrid_alphas",
        alphas,
        "hybrid targets are for method deepmim and target pixel",
    )
    num_taps = len(model.taps)
    rule = f"must be {num_taps} numbers, one per tap"
    require(len(model.mix_alphas) == num_taps, "hybrid_alphas", alphas, rule)


def _check_run(config: RunConfig, networks: Networks) -> None:
    run = config.model.teacher
    if not run:
        raise UserError(
            "target=hybrid: needs a run of method mae whose reconstructions are mixed in; "
            "give --teacher RUN"
        )
    ours, theirs = config.model, networks.config_of(run).model
    if theirs.method != _GENERATOR or theirs.target != "pixel":
        raise UserError(
            f"hybrid={run}: a run of method {theirs.method} and target {theirs.target}; "
            "give one of method mae and target pixel"
        )
    for key in _SHARED:
        if getattr(theirs, key) != getattr(ours, key):
            raise UserError(
                f"hybrid={run}: has {key}={getattr(theirs, key)}, this run "
                f"{key}={getattr(ours, key)}; they must be equal"
            )


def _load(config: RunConfig, networks: Networks) -> Any:
    return networks.trained(config.model.teacher).eval().requires_grad_(False)


SPEC = ObjectiveSpec(
    "hybrid",
    num_pixels,
    HybridObjective,
    load_teacher=_load,
    check_model=_check_model,
    check_run=_check_run,
    is_pixels=True,
)
