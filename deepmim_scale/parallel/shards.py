"""What the optimizer keeps of a stage: copied to the host in shards, put together by parameter.

Legend: D replicas, n values of a group's shard; a shard has 3 rows: weights and both moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.gradients import FlatGroup
from deepmim_scale.parallel.stages import global_parameters


class ShardCopies:
    """Host memory for this rank's shards, made once, [3, n] for each parameter group."""

    def __init__(self, engine: zero.Engine) -> None:
        self._engine = engine
        # Pinned, so that copies run at the bus's speed.
        self.tensors = [
            torch.empty((len(rows), rows[0].numel()), pin_memory=rows[0].is_cuda)
            for rows in zero_state.shards(engine)
        ]

    def take(self) -> None:
        """Copy the state after the last step; returns when the next step may change it."""
        for room, rows in zip(self.tensors, zero_state.shards(self._engine), strict=True):
            for copy, row in zip(room, rows, strict=True):
                copy.copy_(row, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def gather_state(
    engine: zero.Engine, shards: Sequence[Tensor], replicas: Any, writer: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A stage's weights by name and moments as `exp_avg/<name>`; empty but on rank `writer`.

    `replicas` is a group on the host; one message carries a replica's part of a parameter group.
    """
    names = {id(p): name for name, p in global_parameters(engine.module).items()}
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for group, shard in zip(engine.gradients.groups, shards, strict=True):
        whole = _gather(shard, replicas, writer)
        if whole is None:
            continue
        for parameter, (weight, *others) in _cut(group, whole):
            name = names[id(parameter)]
            weights[name] = weight
            for moment, value in zip(zero_state.MOMENTS, others, strict=True):
                moments[f"{moment}/{name}"] = value
    return weights, moments


def _gather(shard: Tensor, replicas: Any, writer: int) -> Tensor | None:
    """All replicas' shards of a group side by side, [3, D n], on the writer."""
    count = dist.get_world_size(replicas)
    if count == 1:
        return shard
    if dist.get_rank() != writer:
        dist.gather(shard, None, dst=writer, group=replicas)
        return None
    parts = [torch.empty_like(shard) for _ in range(count)]
    dist.gather(shard, parts, dst=writer, group=replicas)
    return torch.cat(parts, dim=1)


def _cut(group: FlatGroup, whole: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    for parameter, offset in zip(group.parameters, group.offsets, strict=True):
        rows = whole[:, offset : offset + parameter.numel()]
        yield parameter, [row.view(parameter.shape) for row in rows]
