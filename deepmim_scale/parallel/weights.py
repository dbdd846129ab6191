"""Hands updated weights to all replicas after a step, beside the first work of the next one.

Weights that autocast rounds before it uses them travel rounded: products see the same bits as from
fp32. These are the matrices of linear layers and the patch embedding. Norms, biases, tokens, and
matrices that a weight norm scales, travel in fp32. The optimizer's fp32 masters are never rounded.
Legend: D replicas, N values of a group, n = N / D values of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.parallel.gradients import FlatGroup


@dataclass
class WeightGatherer:
    """Gathers each group's shards, told to wait for a part before it is used."""

    groups: Sequence[FlatGroup]
    flats: Sequence[Tensor]
    """Weights that the module computes with, [N] for each group."""
    process_group: Any
    rounded: torch.dtype | None
    """In which `FlatGroup.is_rounded` groups travel; None: in their own."""
    _running: dict[int, tuple[Any, Tensor, Tensor]] = field(default_factory=dict)

    def start(self) -> None:
        """Begin to gather all groups; this rank's shards hold its updated weights."""
        count = dist.get_world_size(self.process_group)
        if count == 1:
            return
        rank = dist.get_rank(self.process_group)
        for number, (group, flat) in enumerate(zip(self.groups, self.flats, strict=True)):
            shard = flat.chunk(count)[rank]
            narrow = self.rounded is not None and group.is_rounded
            shard = shard.to(self.rounded) if narrow else shard.clone()
            whole = torch.empty(flat.shape, dtype=shard.dtype, device=flat.device)
            work = dist.all_gather_into_tensor(
                whole, shard, group=self.process_group, async_op=True
            )
            self._running[number] = work, whole, shard

    def wait_part(self, part: str) -> None:
        """Put a part's weights in place; returns at once where they are."""
        for number in [n for n in self._running if self.groups[n].part == part]:
            self._place(number)

    def finish(self) -> None:
        """Put everything in place."""
        for number in list(self._running):
            self._place(number)

    def _place(self, number: int) -> None:
        work, whole, _ = self._running.pop(number)
        work.wait()
        # Also over this rank's own shard: all replicas hold the same bits.
        self.flats[number].copy_(whole)
