"""`--log-blocks`: how large the residual stream and the gradients are, block by block.

Only read: a step that is measured changes no bit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepmim_scale.models.stage import Stage
from deepmim_scale.parallel import zero

_REST = "rest"


class BlockLog:
    """What one step did in every encoder block, of which this rank holds some."""

    def __init__(self, module: nn.Module, depth: int, device: torch.device) -> None:
        self.names = [f"block{number:02d}" for number in range(1, depth + 1)]
        self._blocks = {
            int(index): block
            for stage in module.modules()
            if isinstance(stage, Stage)
            for index, block in stage.blocks.items()
        }
        # Sum of mean squares, and their number.
        self._sums = torch.zeros(depth, 2, dtype=torch.float64, device=device)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the output of each block's forward passes meanwhile."""
        self._sums.zero_()

        def watch(index: int) -> object:
            def hook(_: nn.Module, __: object, output: Tensor) -> None:
                mean_square = output.detach().double().square().mean()
                self._sums[index] += torch.stack([mean_square, torch.ones_like(mean_square)])

            return hook

        handles = [
            block.register_forward_hook(watch(index))  # type: ignore[arg-type]
            for index, block in self._blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def magnitudes(self) -> dict[str, float]:
        """Root mean square of the residual stream after each block; every rank calls it."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        values = (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt().tolist()
        return dict(zip(self.names, values, strict=True))

    def gradient_norms(self, engine: zero.Engine) -> dict[str, float]:
        """Norm of each block's reduced gradient, between reduction and step; all ranks call it."""
        found = zero.gradient_norms(engine, [*self.names, _REST], _block_of)
        return {name: found[name] for name in self.names}


def _block_of(name: str) -> str:
    """Which encoder block a parameter belongs to, or the rest."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return f"block{int(found[1]) + 1:02d}" if found else _REST
