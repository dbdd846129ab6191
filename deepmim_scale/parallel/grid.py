"""Which rank holds which stage of which replica, and the process groups between them.

Groups are made in rounds: in one round every rank makes exactly one group, with its members alone.
So a start needs as many collectives on 512 ranks as on 8, and torch, which names a group after a
counter of each rank's groups, counts alike everywhere.
Legend: P stages, D replicas; rank = stage * D + replica, so that a stage's replicas are neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from deepmim_scale.parallel.watch import limited


def make_group(
    groups: Sequence[Sequence[int]], timeout: timedelta | None = None, backend: str | None = None
) -> Any:
    """This rank's group of disjoint ones (a group of its own where it is in none), in one round."""
    me = dist.get_rank()
    mine = next((ranks for ranks in groups if me in ranks), [me])
    timeout = timeout or distributed_c10d.default_pg_timeout
    with limited(timeout.total_seconds()):
        return dist.new_group(
            list(mine), timeout=timeout, backend=backend, use_local_synchronization=True
        )


class ProcessGrid:
    """Stages and replicas; DeepSpeed knows it as its model-parallel unit (`mpu`)."""

    def __init__(self, num_stages: int) -> None:
        world, me = dist.get_world_size(), dist.get_rank()
        num_replicas = world // num_stages
        self._stage, self._replica = divmod(me, num_replicas)
        self.stage_groups = [
            list(range(s * num_replicas, (s + 1) * num_replicas)) for s in range(num_stages)
        ]
        """Ranks of each stage, a replica each."""
        self.pipe_groups = [list(range(r, world, num_replicas)) for r in range(num_replicas)]
        """Ranks of each replica's pipeline, in the order of its stages."""
        self._data_parallel_group = make_group(self.stage_groups)
        self._pipe_group = make_group(self.pipe_groups)

    def get_stage_id(self) -> int:
        """Which stage (rank of the pipeline) this process holds."""
        return self._stage

    def get_data_parallel_rank(self) -> int:
        """Which replica this process belongs to."""
        return self._replica

    def get_data_parallel_world_size(self) -> int:
        """D."""
        return len(self.pipe_groups)

    def get_data_parallel_group(self) -> Any:
        """All replicas of this process's stage."""
        return self._data_parallel_group

    # To DeepSpeed a pipeline is model parallelism.
    def get_model_parallel_rank(self) -> int:
        """The stage."""
        return self._stage

    def get_model_parallel_world_size(self) -> int:
        """P."""
        return len(self.pipe_groups[0])

    def get_model_parallel_group(self) -> Any:
        """All stages of this process's replica."""
        return self._pipe_group

    # Layers are not cut: tensor parallelism of one.
    def get_slice_parallel_rank(self) -> int:
        """Always 0."""
        return 0

    def get_slice_parallel_world_size(self) -> int:
        """Always 1."""
        return 1
