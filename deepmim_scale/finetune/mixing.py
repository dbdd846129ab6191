"""Mixup and cutmix of a micro-batch with itself in reverse, by timm.

timm cuts boxes of an odd side one pixel larger than the official code's old timm did.
"""

from __future__ import annotations

from timm.data import Mixup
from torch import Tensor

from deepmim_scale.finetune.draws import seed_mixing


class Mixing:
    """One draw of its own for every micro-batch; leaves images alone with both strengths at 0."""

    def __init__(
        self, *, mixup: float, cutmix: float, smoothing: float, num_classes: int, seed: int
    ) -> None:
        self.is_on, self._seed = bool(mixup or cutmix), seed
        self._mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, part: int
    ) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S], labels [B] -> mixed in place, with soft targets [B, K]; B is even.

        Without mixing both come back as they are.
        """
        if not self.is_on:
            return images, labels
        seed_mixing(self._seed, step, part)
        return self._mix(images, labels)
