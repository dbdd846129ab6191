"""Linear layers whose backward leaves the weight gradient for later (zero-bubble schedules).

The gradient with respect to the input is what other stages wait for; the one with respect to the
weight can run at any time before the optimizer does. Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class WeightQueue:
    """Where backward passes put their weight gradients; `run` adds them to `.grad` in order."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def run(self) -> None:
        """Compute everything that waits."""
        for compute in self.pending:
            compute()
        self.pending = []


class _Deferral:
    """Where weight gradients go now; None: they are computed at once.

    Autograd runs backward passes on threads of its own, which a context variable would not reach.
    """

    queue: WeightQueue | None = None


@contextlib.contextmanager
def defer_weight_gradients(queue: WeightQueue | None) -> Iterator[None]:
    """Backward passes inside put weight gradients of Linear layers into `queue`."""
    before, _Deferral.queue = _Deferral.queue, queue
    try:
        yield
    finally:
        _Deferral.queue = before


def current_queue() -> WeightQueue | None:
    """Where a backward pass that runs now puts its weight gradients."""
    return _Deferral.queue


class _QueuedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, owner: nn.Linear, rows: slice
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.rows = owner, rows
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        owner, rows = ctx.owner, ctx.rows
        flat = grad.flatten(0, -2)

        def accumulate() -> None:
            # Out of autocast, which on a GPU would sum biases in fp32 and leave them unrounded.
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                _add_rows(owner.weight, rows, flat.t().mm(x.flatten(0, -2)))
                _add_rows(owner.bias, rows, flat.sum(0))

        queue = current_queue()
        assert queue is not None, "a split backward pass needs a queue"
        queue.pending.append(accumulate)
        return flat.mm(weight).view(x.shape), None, None, None, None


def _add_rows(parameter: nn.Parameter, rows: slice, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    whole = gradient.shape == parameter.shape
    if parameter.grad is None:
        parameter.grad = gradient if whole else torch.zeros_like(parameter)
        if whole:
            return
    # Not `+=`, which would copy the slice onto itself after adding to it.
    parameter.grad[rows].add_(gradient)


def linear(layer: nn.Linear, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """`layer(x)`, or its outputs `rows` alone: [.., I] -> [.., O].

    Inside `defer_weight_gradients` the weight gradient is queued.
    """
    weight, bias = layer.weight[rows], layer.bias[rows]
    if current_queue() is None:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _QueuedLinear.apply(x, weight.detach(), bias.detach(), layer, rows)


class SplitLinear(nn.Linear):
    """A Linear that can leave its weight gradient to a queue."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] -> [.., O]."""
        return linear(self, x)


def split_weight_gradients(module: nn.Module) -> None:
    """Make every plain Linear inside `module` a SplitLinear (names and weights stay)."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = SplitLinear
