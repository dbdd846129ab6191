"""Where a decoder hangs on the encoder: autograd nodes that keep the order of every sum fixed.

A tap is a node whose backward returns (gradient from downstream) + (gradient of the decoder), in
one addition with the decoder's term last. All ways to run a model - joint, local backward, any
pipeline schedule - go through such nodes, so their gradients are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Leaf:
    """A decoder's detached copy of a feature; holds d(loss)/d(feature) once the decoder has run."""

    def __init__(self, feature: Tensor) -> None:
        self.tensor = feature.detach().requires_grad_()

    def take_grad(self) -> Tensor:
        """The decoder's gradient; frees the copy."""
        grad = self.tensor.grad
        assert grad is not None, "the decoder must run backward before its encoder does"
        self.tensor = grad
        return grad


def _add(downstream: Tensor | None, local: Tensor) -> Tensor:
    return local if downstream is None else downstream + local


class _Tap(Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor, leaf: Leaf) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.leaf = leaf
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None]:
        return _add(grad, ctx.leaf.take_grad()), None


class _Fork(Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return feature.view_as(feature), feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor:
        downstream, local = grads
        assert local is not None, "every decoder's loss must be part of the backward pass"
        return _add(downstream, local)


class _GradientRoot(Function):
    @staticmethod
    def forward(ctx: Any, grads: tuple[Tensor | None, ...], *state: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.zeros((), dtype=torch.float32, device=state[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.grads)


def fork(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Joint backward: (feature for the encoder, feature for the decoder), one graph."""
    return _Fork.apply(feature)


def detach_tap(feature: Tensor) -> tuple[Tensor, Leaf]:
    """Local backward: (feature for the encoder, leaf for the decoder), two graphs."""
    leaf = Leaf(feature)
    return _Tap.apply(feature, leaf), leaf


def gradient_root(state: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Tensor:
    """A scalar 0 whose backward enters `grads` into `state` as they are.

    `engine.backward` takes scalars only and multiplies them by loss scale / M; gradients that come
    from a decoder or a later stage carry that factor already, so they must enter unscaled.
    """
    return _GradientRoot.apply(grads, *state)
