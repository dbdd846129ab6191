"""What all hosts must have alike before they train together."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from deepmim_scale.data.source import Source
from deepmim_scale.errors import UserError


def check_same_data(location: str, sources: Sequence[Source | None]) -> None:
    """UserError on every rank where a host lists other images than rank 0's does.

    Nothing later would show it: every rank draws its images by number.
    """
    mine = [(len(source), source.sha) for source in sources if source is not None]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    first, expected = everyone[0]
    others = {host: found for host, found in everyone if found != expected}
    if others:
        host, found = next(iter(others.items()))
        raise UserError(
            f"data={location}: {', '.join(others)}: other images than {first} has "
            f"({_shown(found)} on {host}, {_shown(expected)} on {first}); copy them again, or give "
            "a folder that all hosts share"
        )


def _shown(found: list[tuple[int, str]]) -> str:
    return " and ".join(f"{count:,} images of sha {sha[:8]}" for count, sha in found)
