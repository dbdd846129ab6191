"""DeepMIM's hybrid targets: pixels x mixed with the reconstruction x_hat of a frozen MAE.

A tap's target is a * x + (1 - a) * x_hat (DeepMIM, WACV 2025). The paper's space of this mixture is
not published; ours is the one that the loss compares in: patch-normalized with norm_pix.
Legend: B images, C channels, L patches, K visible patches, P pixels of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepmim_scale.models.model import Model
from deepmim_scale.models.stage import State


class Generator(nn.Module):
    """A frozen MAE that reconstructs the patches which a mask removes."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """x_hat [B, L-K, P] of normalized images [B, C, H, W] masked by noise [B, L]."""
        model, inputs = self.model, {}

        def tap(name: str, tensors: State) -> State:
            inputs[name] = tensors
            return tensors

        masking = model.masking(images, noise)
        model.encode(model.embed(images, masking), tap)
        ((name, tensors),) = inputs.items()  # an MAE has one decoder
        return model.decode(name, tensors, masking)
