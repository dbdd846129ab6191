"""Sums gradients over the replicas of a stage: each parameter group as one flat tensor.

A group is the unit: its gradients are packed, cast and handed to the owners of its parts in three
launches, while the rank goes on computing. The layout of a group is that of its flat weights.
Legend: D replicas, N values of a group with its padding, n = N / D values of a shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

VECTOR = 16
"""fp32 values that a CPU handles at once, at most."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that lie one after another in a flat buffer of N values."""

    parameters: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...]
    size: int
    part: str = ""
    """Of the model: the groups of one part are summed at the same moment."""
    is_rounded: bool = False
    """Autocast rounds every weight of the group before it uses it."""

    @property
    def gaps(self) -> list[int]:
        """Values of padding before each parameter, and after the last one."""
        ends = [0, *(o + p.numel() for o, p in zip(self.offsets, self.parameters, strict=True))]
        starts = [*self.offsets, self.size]
        return [start - end for start, end in zip(starts, ends, strict=True)]

    def pieces(self, first: int, last: int) -> list[tuple[nn.Parameter, int, int]]:
        """Parameters with values in [first, last), each with its part of that range."""
        found = []
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            start, end = max(offset, first), min(offset + parameter.numel(), last)
            if start < end:
                found.append((parameter, start - first, end - first))
        return found


class Wishes(NamedTuple):
    """What a rank asks for after a step. One rank's wish is everyone's; they ride with the norm."""

    stop: bool = False
    save: bool = False
    fail: bool = False
    """Its last save could not be written."""
    alarm: bool = False
    """Bits have changed that no step has changed."""


class Guard(Protocol):
    """Watches the bits of weights and of the optimizer's state."""

    alarm: Tensor
    """bool [1], on the device: whether this rank has found something."""

    def before_update(self) -> None:
        """Gradients are summed; nothing may have changed since the last update."""

    def after_update(self) -> None:
        """Look at what the update left."""


@dataclass
class _Reduction:
    """A sum that is under way."""

    work: Any
    shard: Tensor
    packed: Tensor
    """Kept until the sum is done."""


@dataclass
class GradientReducer:
    """Adds up the gradients of one rank's groups over its replicas, when it is told to."""

    groups: Sequence[FlatGroup]
    process_group: Any
    dtype: torch.dtype | None
    """In which gradients travel; None: in their own."""
    norm: float = 0.0
    """Of the last step's gradient over all stages, as the loss scale left it."""
    wishes: Wishes = field(default_factory=Wishes)
    """Of this rank, before the norm is taken."""
    agreed: Wishes = field(default_factory=Wishes)
    """Of all ranks, afterwards."""
    guard: Guard | None = None
    _running: dict[int, list[_Reduction]] = field(default_factory=dict)
    _shards: dict[int, Tensor] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def start(self, number: int) -> None:
        """Begin to sum what a group's parameters hold, and take it from them."""
        group, replicas = self.groups[number], dist.get_world_size(self.process_group)
        packed = self._pack(group)
        if replicas == 1:
            self._add(number, packed)
            return
        # As DeepSpeed: the mean, divided first, so that 16 bits do not overflow.
        packed = packed.to(self.dtype or packed.dtype).div_(replicas)
        shard = packed.new_empty(group.size // replicas)
        work = dist.reduce_scatter_tensor(shard, packed, group=self.process_group, async_op=True)
        self._running.setdefault(number, []).append(_Reduction(work, shard, packed))

    def start_part(self, part: str) -> None:
        """Begin with the groups of a part that have gradients."""
        for number, group in enumerate(self.groups):
            if group.part == part and any(p.grad is not None for p in group.parameters):
                self.start(number)

    def arm_part(self, part: str) -> None:
        """Begin with each group of a part as soon as the next backward pass has completed it."""
        for number, group in enumerate(self.groups):
            if group.part == part:
                self._arm(number, group)

    def _arm(self, number: int, group: FlatGroup) -> None:
        missing = len(group.parameters)

        def count(parameter: Tensor) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self.start(number)

        self._hooks += [p.register_post_accumulate_grad_hook(count) for p in group.parameters]

    def start_complete(self) -> None:
        """Begin with every group whose parameters all have a gradient."""
        for number, group in enumerate(self.groups):
            if all(parameter.grad is not None for parameter in group.parameters):
                self.start(number)

    def finish(self) -> list[Tensor]:
        """Sum what is left, wait, and return this rank's shard of each group in fp32, [n]."""
        for number, group in enumerate(self.groups):
            untouched = number not in self._running and number not in self._shards
            if untouched or any(parameter.grad is not None for parameter in group.parameters):
                self.start(number)
        for number, reductions in self._running.items():
            for reduction in reductions:
                reduction.work.wait()
                self._add(number, reduction.shard)
        shards = [self._shards[number] for number in range(len(self.groups))]
        self.drop()
        return shards

    def drop(self) -> None:
        """Forget every gradient."""
        self._running, self._shards = {}, {}
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def _pack(self, group: FlatGroup) -> Tensor:
        some = group.parameters[0]
        pieces: list[Tensor] = []
        for gap, parameter in zip(group.gaps, (*group.parameters, None), strict=True):
            if gap:
                pieces.append(some.new_zeros(gap))
            if parameter is not None:
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                pieces.append(gradient.reshape(-1))
                parameter.grad = None
        return torch.cat(pieces)

    def _add(self, number: int, shard: Tensor) -> None:
        if number in self._shards:
            self._shards[number].add_(shard)
        else:
            self._shards[number] = shard.float()


@contextlib.contextmanager
def padded_groups(
    module: nn.Module, optimizer: torch.optim.Optimizer, num_replicas: int
) -> Iterator[None]:
    """Fill each parameter group up, so that every shard is a multiple of VECTOR values.

    Fused AdamW rounds what is left beyond whole vectors in another way on a CPU, and bits would
    depend on how a model is cut into stages. DeepSpeed wants every parameter to be the module's
    while it is set up.
    """
    names = []
    for number, group in enumerate(optimizer.param_groups):
        parameters: list[nn.Parameter] = group["params"]
        rest = -sum(p.numel() for p in parameters) % (VECTOR * num_replicas)
        if rest:
            names.append(f"padding{number}")
            fill = nn.Parameter(parameters[0].new_zeros(rest))
            module.register_parameter(names[-1], fill)
            parameters.append(fill)
    yield
    for name in names:
        delattr(module, name)
