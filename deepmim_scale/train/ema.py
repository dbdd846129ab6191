"""The moving average of MIRL's weights (util/ema.py of its release), as a function of updates.

After update k (from 1) the average a is d a + (1 - d) w with d = min(decay, k / (k + 9)), from
a = 0. It is evaluated as a / (1 - d^k). Unlike MIRL's, it does not move at a skipped step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Weights = nn.Module | Mapping[str, Tensor]


class Ema:
    """A copy of weights, by their names; equal on every rank whose weights are equal.

    Weights are a module's parameters, or those that an optimizer keeps in fp32.
    """

    def __init__(self, module: Weights, decay: float) -> None:
        self.decay, self.updates = decay, 0
        full = torch.float32
        self._sums = {
            name: torch.zeros_like(value, dtype=torch.promote_types(value.dtype, full))
            for name, value in _tensors(module).items()
        }

    @torch.no_grad()
    def update(self, module: Weights) -> None:
        """Move after one applied update of the weights."""
        weights = _tensors(module)
        self.updates += 1
        sums = list(self._sums.values())
        news = [weights[name].to(self._sums[name]) for name in self._sums]
        torch._foreach_lerp_(sums, news, 1 - self._factor())

    def averages(self) -> dict[str, Tensor]:
        """The average to evaluate, after at least one update."""
        correction = 1 - self._factor() ** self.updates
        return {name: value / correction for name, value in self._sums.items()}

    def _factor(self) -> float:
        return min(self.decay, self.updates / (self.updates + 9))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, beside the number of updates."""
        return self._sums

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, value in state.items():
            self._sums[name].copy_(value)


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
