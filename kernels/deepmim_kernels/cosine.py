"""Masked cosine loss against a teacher's token features, fused.

    l[n]     = 2 - 2 * cos(pred[n], teacher[n])         no eps, as in DeepMIM's released code
    loss     = sum_n m[n] * l[n] / sum_n m[n]
    dloss/dp = 2 * (cos * p / |p| - t / |t|) / |p| * m[n] / sum m

Shapes: B batch, L patches, T tokens of a prediction (L + prefix, or K packed), K masked patches,
D features.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepmim_kernels._common import launch, onepass_gradient, row_scale, row_weight, warps_for


@triton.jit
def masked_cosine_kernel(
    pred_ptr,
    teacher_ptr,
    mask_ptr,
    ids_ptr,
    upstream_ptr,
    count_ptr,
    rows_ptr,
    grad_ptr,
    teacher_tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFIX: tl.constexpr,
    TEACHER_PREFIX: tl.constexpr,
):
    """One program per token; null pointers switch their parts off at compile time."""
    t = tl.program_id(0)
    num_tokens = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    row = b * num_tokens + t
    d = tl.arange(0, BLOCK)
    inside = d < D
    weight = row_weight(mask_ptr, b, t, num_tokens, PREFIX)
    if weight == 0.0:
        if rows_ptr is not None:
            tl.store(rows_ptr + row, 0.0)
        if grad_ptr is not None:
            zeros = tl.zeros((BLOCK,), dtype=grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * D + d, zeros, mask=inside)
    else:
        n = tl.load(ids_ptr + row).to(tl.int32) if ids_ptr is not None else t - PREFIX
        teacher_row = b * teacher_tokens + n + TEACHER_PREFIX
        p = tl.load(pred_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(teacher_ptr + teacher_row * D + d, mask=inside, other=0.0).to(tl.float32)
        inverse_p = 1.0 / tl.sqrt(tl.sum(p * p, axis=0))
        inverse_q = 1.0 / tl.sqrt(tl.sum(q * q, axis=0))
        cosine = tl.sum(p * q, axis=0) * inverse_p * inverse_q
        if rows_ptr is not None:
            tl.store(rows_ptr + row, weight * (2.0 - 2.0 * cosine))
        if grad_ptr is not None:
            scale = row_scale(upstream_ptr, count_ptr) * weight * 2.0 * inverse_p
            gradient = (cosine * inverse_p * p - inverse_q * q) * scale
            tl.store(grad_ptr + row * D + d, gradient.to(grad_ptr.dtype.element_ty), mask=inside)


def launch_masked_cosine(
    rows: Tensor | None,
    grad: Tensor | None,
    pred: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    ids: Tensor | None,
    upstream: Tensor | None,
    count: Tensor | None,
    prefix_tokens: int,
    teacher_prefix_tokens: int,
) -> None:
    """Fill `rows` [B, T] fp32 and `grad` [B, T, D]; either may be None."""
    batch, num_tokens, dim = pred.shape
    block = triton.next_power_of_2(dim)
    launch(
        masked_cosine_kernel,
        (num_tokens, batch),
        pred.contiguous(),
        teacher.contiguous(),
        mask,
        ids,
        upstream,
        count,
        rows,
        grad,
        teacher.shape[1],
        D=dim,
        BLOCK=block,
        PREFIX=prefix_tokens,
        TEACHER_PREFIX=teacher_prefix_tokens,
        num_warps=warps_for(block, pred.element_size()),
    )


_INPUTS = "Tensor pred, Tensor teacher, Tensor? mask, Tensor? ids"
_CONFIG = "int prefix_tokens, int teacher_prefix_tokens"


@torch.library.custom_op(
    "deepmim::masked_cosine",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? hint, Tensor? count, bool onepass, {_CONFIG})"
    " -> (Tensor loss, Tensor rows, Tensor grad)",
)
def masked_cosine_op(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], weighted rows [B, T] and, if `onepass`, the gradient at scale `hint`."""
    tensors, onepass, config = args[:5], args[5], args[6:]
    _, rows, grad = _outputs(pred, *args)
    launch_masked_cosine(rows, grad if onepass else None, pred, *tensors, *config)
    count = tensors[-1]
    return rows.sum() / (rows.numel() if count is None else count), rows, grad


@masked_cosine_op.register_fake
def _outputs(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    onepass = args[5]
    rows = pred.new_empty(pred.shape[:2], dtype=torch.float32)
    grad = torch.empty(pred.shape if onepass else (0,), dtype=pred.dtype, device=pred.device)
    return pred.new_empty((), dtype=torch.float32), rows, grad


@torch.library.custom_op(
    "deepmim::masked_cosine_gradient",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor upstream, Tensor? count, {_CONFIG}) -> Tensor",
)
def masked_cosine_gradient_op(pred: Tensor, *args: Any) -> Tensor:
    """The gradient [B, T, D] from the saved inputs (mode `recompute`)."""
    grad = _gradient(pred)
    launch_masked_cosine(None, grad, pred, *args)
    return grad


@masked_cosine_gradient_op.register_fake
def _gradient(pred: Tensor, *args: Any) -> Tensor:
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, hint, count, onepass = inputs[:7]
    ctx.set_materialize_grads(False)
    ctx.config = inputs[7:]
    ctx.onepass = onepass
    ctx.spent = False
    ctx.save_for_backward(*((output[2], hint) if onepass else (*tensors, count)))


def _backward(
    ctx: Any, upstream: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 9
    if ctx.onepass:
        grad = onepass_gradient(ctx, upstream)
    else:
        *inputs, count = ctx.saved_tensors
        grad = masked_cosine_gradient_op(*inputs, upstream, count, *ctx.config)
    return (grad, *[None] * 8)


masked_cosine_op.register_autograd(_backward, setup_context=_setup_context)
