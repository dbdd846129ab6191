"""Messages between the stages of one replica, each wait with a time-out.

A message's tensors follow one another on the channel of their payload and direction, in micro-batch
order at both ends (plan/schedule.py), so they need no tags.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.parallel.stages import Spec
from deepmim_scale.plan.schedule import Instruction, Payload, Pipeline

PAYLOADS: tuple[Payload, ...] = ("activation", "gradient", "prediction", "prediction_gradient")


class Channels:
    """Point-to-point messages of one rank; `ranks` are its replica's global ranks in order."""

    def __init__(
        self,
        pipeline: Pipeline,
        ranks: list[int],
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.bytes_sent: Counter[Payload] = Counter()
        """Payload bytes sent since the start."""
        self._pipeline, self._ranks, self._device = pipeline, ranks, device
        self._timeout = timedelta(seconds=timeout_seconds)
        # gloo carries no CUDA tensors point to point: several stages may share one GPU this way.
        self._through_host = dist.get_backend() == "gloo" and device.type == "cuda"
        self._sends: list[tuple[Any, Tensor]] = []
        self._groups: dict[tuple[Payload, bool], Any] = {}
        if len(ranks) > 1:
            payloads = PAYLOADS if pipeline.paired else PAYLOADS[:2]
            # A communicator per payload and direction: none waits behind another's message.
            for payload in payloads:
                for downwards in (True, False):
                    self._groups[payload, downwards] = dist.new_group(
                        ranks, timeout=self._timeout, use_local_synchronization=True
                    )

    def _channel(self, message: Instruction) -> tuple[Any, int]:
        assert message.payload is not None, f"{message} is no message"
        assert message.peer is not None, f"{message} has no peer"
        mine, theirs = (self._pipeline.rank_of(s) for s in (message.stage, message.peer))
        source, target = (mine, theirs) if message.kind == "send" else (theirs, mine)
        return self._groups[message.payload, source < target], self._ranks[theirs]

    def send(self, message: Instruction, tensors: tuple[Tensor, ...]) -> None:
        """Start sending; returns at once."""
        group, peer = self._channel(message)
        assert message.payload is not None, f"{message} is no message"
        for tensor in tensors:
            tensor = tensor.contiguous()
            self.bytes_sent[message.payload] += tensor.numel() * tensor.element_size()
            if self._through_host:
                tensor = tensor.cpu()
            # The tensor is kept until the send is done.
            self._sends.append((dist.isend(tensor, peer, group=group), tensor))

    def receive(self, message: Instruction, specs: list[Spec]) -> tuple[Tensor, ...]:
        """Wait for a message's tensors; RuntimeError after the time-out or if the peer is gone."""
        group, peer = self._channel(message)
        where = torch.device("cpu") if self._through_host else self._device
        tensors = [spec.empty(where) for spec in specs]
        for work in [dist.irecv(tensor, peer, group=group) for tensor in tensors]:
            assert work is not None, "this rank belongs to its own channels"
            work.wait(self._timeout)
        return tuple(tensor.to(self._device) for tensor in tensors)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for work, _ in self._sends:
            work.wait(self._timeout)
        self._sends = []
