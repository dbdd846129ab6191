"""The custom ops of a loss that is a mean over rows: forward, gradient, autograd.

Shapes: B batch, T tokens of a prediction, D features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepmim_kernels._common import onepass_gradient

# (rows, grad, pred, other inputs, upstream, count, settings): fills rows [B, T], grad [B, T, D].
Launch = Callable[..., None]


def register_row_loss(
    name: str, launch: Launch, *, inputs: str, settings: str, has_pair: bool
) -> Any:
    """Register `deepmim::<name>` and its gradient op; returns the op for the public function.

    `inputs` and `settings` are parts of the op's schema; the first input is the prediction, and
    with `has_pair` the second may be another one that shares its gradient. The op takes the
    inputs, expected_scale, count, onepass and the settings, and returns the loss [], the weighted
    rows [B, T] in fp32 and, if `onepass`, the gradient [B, T, D] for the upstream gradient
    `expected_scale`.
    """
    num_inputs = inputs.count(",") + 1
    num_others = (
        num_inputs + 1
    )  # expected_scale or upstream, and count, but for the prediction itself

    def outputs(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Contiguous whatever strides pred has: the kernels write rows one after another.
        rows = pred.new_empty(pred.shape[:2], dtype=torch.float32)
        # An op has a fixed number of results; without a gradient the last one is empty.
        shape = pred.shape if args[num_others] else (0,)
        grad = torch.empty(shape, dtype=pred.dtype, device=pred.device)
        return pred.new_empty((), dtype=torch.float32), rows, grad

    def forward(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, onepass = args[:num_others], args[num_others]
        _, rows, grad = outputs(pred, *args)
        launch(rows, grad if onepass else None, pred, *tensors, *args[num_others + 1 :])
        # One deterministic reduction by torch over B * T numbers instead of atomics.
        count = tensors[-1]
        return rows.sum() / (rows.numel() if count is None else count), rows, grad

    def empty_gradient(pred: Tensor, *args: Any) -> Tensor:
        return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)

    def gradient(pred: Tensor, *args: Any) -> Tensor:
        grad = empty_gradient(pred)
        launch(None, grad, pred, *args)
        return grad

    op = torch.library.custom_op(
        f"deepmim::{name}",
        forward,
        mutates_args=(),
        schema=f"({inputs}, Tensor? expected_scale, Tensor? count, bool onepass, {settings})"
        " -> (Tensor loss, Tensor rows, Tensor grad)",
    )
    op.register_fake(outputs)
    # Mode `recompute`: the gradient from the saved inputs.
    gradient_op = torch.library.custom_op(
        f"deepmim::{name}_gradient",
        gradient,
        mutates_args=(),
        schema=f"({inputs}, Tensor upstream, Tensor? count, {settings}) -> Tensor",
    )
    gradient_op.register_fake(empty_gradient)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, expected_scale, count, onepass = inputs[: num_inputs + 3]
        # None, not a tensor of zeros, for results that nobody differentiates.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.settings = inputs[num_inputs + 3 :]
        ctx.onepass = onepass
        ctx.pair = has_pair and tensors[1] is not None
        ctx.spent = False
        ctx.save_for_backward(*((output[2], expected_scale) if onepass else (*tensors, count)))

    def backward(
        ctx: Any, upstream: Tensor | None, *unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        num_rest = num_inputs + 1 + len(ctx.settings)
        if upstream is None:
            return (None,) * (num_rest + 2)
        if ctx.onepass:
            grad = onepass_gradient(ctx, upstream)
        else:
            *tensors, count = ctx.saved_tensors
            grad = gradient_op(*tensors, upstream, count, *ctx.settings)
        # d(p + p2) is the same for both: one tensor serves them.
        return (grad, grad if ctx.pair else None, *[None] * num_rest)

    op.register_autograd(backward, setup_context=setup_context)
    return op
