"""Process groups that only their members make.

`torch.distributed.new_group` is otherwise a collective of all ranks for every group: a pipeline of
8 stages on 512 ranks would take part in 1600 of them before its first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def new_own_group(
    ranks: Sequence[int] | None = None, timeout: timedelta | None = None
) -> dist.ProcessGroup | None:
    """The group of `ranks` (default: all), made by its members; None on every other rank.

    Members of several groups must make them in one order.
    """
    if ranks is not None and dist.get_rank() not in ranks:
        return None
    members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "a member belongs to its group"
    return group


@contextlib.contextmanager
def members_only(module: Any) -> Iterator[None]:
    """Inside, `module.new_group` makes this rank's groups only."""
    make, module.new_group = module.new_group, new_own_group
    try:
        yield
    finally:
        module.new_group = make
