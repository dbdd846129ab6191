"""Messages between the stages of one replica, each wait with a time-out.

Every payload has a channel of its own from one rank to another, on which its messages follow one
another in micro-batch order at both ends (pipeline/ir.py), so they need no tags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.parallel.grid import make_group
from deepmim_scale.parallel.stages import TensorRoom
from deepmim_scale.parallel.watch import limited
from deepmim_scale.pipeline.ir import Instruction, Message, Payload, Pipeline, Schedule

Channel = tuple[Payload, int, int]
"""Payload, source and target as ranks of the pipeline."""


def channels_of(schedule: Schedule) -> list[Channel]:
    """All channels of a schedule, in an order that every rank agrees on."""
    sends = [step for rank in schedule.ranks for step in rank if step.kind == "send"]
    return sorted({_channel(schedule.pipeline, step) for step in sends})


def rounds_of(channels: Sequence[Channel]) -> list[list[Channel]]:
    """The channels in rounds, in each of which no rank has two."""
    rounds: list[list[Channel]] = []
    for channel in channels:
        ends = set(channel[1:])
        free = (r for r in rounds if not any(ends & set(other[1:]) for other in r))
        found = next(free, None)
        if found is None:
            rounds.append([channel])
        else:
            found.append(channel)
    return rounds


def _channel(pipeline: Pipeline, message: Instruction) -> Channel:
    assert message.payload is not None, f"{message} is no message"
    assert message.peer is not None, f"{message} has no peer"
    mine, theirs = (pipeline.rank_of(stage) for stage in (message.stage, message.peer))
    source, target = (mine, theirs) if message.kind == "send" else (theirs, mine)
    return message.payload, source, target


class Channels:
    """Point-to-point messages of one rank; `replicas` are the global ranks of each pipeline."""

    def __init__(
        self,
        schedule: Schedule,
        replicas: list[list[int]],
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.bytes_sent: Counter[Payload] = Counter()
        """Payload bytes sent since the start."""
        self._pipeline, self._device = schedule.pipeline, device
        me, timeout = dist.get_rank(), timedelta(seconds=timeout_seconds)
        self._ranks = next(ranks for ranks in replicas if me in ranks)
        # gloo carries no CUDA tensors point to point: several stages may share one GPU this way.
        gloo = dist.get_backend() == "gloo"
        self._where = torch.device("cpu") if gloo else device
        # NCCL would poll on the host for a time-out of the wait; it has its own watchdog.
        self._wait: dict[str, timedelta] = {"timeout": timeout} if gloo else {}
        self._sends: list[tuple[Any, Tensor]] = []
        self._receives: dict[Message, list[tuple[Any, Tensor]]] = {}
        self._groups: dict[Channel, Any] = {}
        # A communicator of two ranks for each channel. On a shared one NCCL carries messages one
        # by one, and a send holds up everything behind it until the other side receives: a ring of
        # ranks that all send first would never end.
        for channels in rounds_of(channels_of(schedule)):
            pairs = {
                channel: [[ranks[channel[1]], ranks[channel[2]]] for ranks in replicas]
                for channel in channels
            }
            group = make_group([pair for some in pairs.values() for pair in some], timeout)
            for channel, some in pairs.items():
                if any(me in pair for pair in some):
                    self._groups[channel] = group
        with limited(timeout_seconds):
            self._connect()

    def _connect(self) -> None:
        # The first message of a pair blocks both hosts until both are there: now, in one order.
        token = torch.zeros(1, device=self._where)
        for (_, source, target), group in sorted(self._groups.items(), key=lambda entry: entry[0]):
            if dist.get_rank() == self._ranks[source]:
                dist.send(token, self._ranks[target], group=group)
            else:
                dist.recv(token, self._ranks[source], group=group)

    def send(self, message: Instruction, tensors: tuple[Tensor, ...]) -> None:
        """Start sending; returns at once."""
        channel = payload, _, target = _channel(self._pipeline, message)
        # A tensor is kept until it has left.
        self._sends = [entry for entry in self._sends if not entry[0].is_completed()]
        for tensor in tensors:
            tensor = tensor.contiguous()
            self.bytes_sent[payload] += tensor.numel() * tensor.element_size()
            tensor = tensor.to(self._where)
            work = dist.isend(tensor, self._ranks[target], group=self._groups[channel])
            self._sends.append((work, tensor))

    def receive(self, message: Instruction, rooms: Sequence[TensorRoom]) -> None:
        """Post room for a message's tensors; returns at once."""
        channel = _, source, _ = _channel(self._pipeline, message)
        tensors = [room.empty(self._where) for room in rooms]
        self._receives[message.message] = [
            (dist.irecv(tensor, self._ranks[source], group=self._groups[channel]), tensor)
            for tensor in tensors
        ]

    def wait(self, message: Instruction) -> tuple[Tensor, ...]:
        """A posted message's tensors; RuntimeError after the time-out or if the peer is gone."""
        found = []
        for work, tensor in self._receives.pop(message.message):
            work.wait(**self._wait)
            found.append(tensor.to(self._device))
        return tuple(found)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for work, _ in self._sends:
            work.wait(**self._wait)
        self._sends = []

    def close(self) -> None:
        """Give the communicators back; another pipeline may be built in these processes."""
        for group in self._groups.values():
            dist.destroy_process_group(group)
