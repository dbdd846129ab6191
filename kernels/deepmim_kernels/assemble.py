"""Decoder input assembly: CLS, un-shuffle, mask tokens and positions in one pass.

    y[0]     = tokens[0] + pos[0]
    y[n + 1] = (tokens[r + 1] if r < K else mask_token) + pos[n + 1],   r = ids_restore[n]

Backward: every visible row of the gradient is copied to its token; the rows of masked patches are
added up, first within chunks of rows, then over chunks, always in the same order (no atomics).
Shapes: B batch, L patches, T = L + 1 tokens, K visible patches, D features.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepmim_kernels._common import launch, warps_for

# Output tokens per program: few in the forward pass, more where each program writes a partial sum.
FORWARD_ROWS = 4
GRADIENT_ROWS = 16


@triton.jit
def load_rank(restore_ptr, b, t, num_tokens):
    """Place of token t in the shuffled order; -1 for CLS, whose features are row 0 of tokens."""
    # No branch: CLS takes rank -1, and rank + 1 is its row of tokens like any other.
    patch = (t > 0) & (t < num_tokens)
    rank = tl.load(restore_ptr + b * (num_tokens - 1) + t - 1, mask=patch, other=-1)
    return rank.to(tl.int32)


@triton.jit
def assemble_kernel(
    tokens_ptr,
    mask_token_ptr,
    pos_ptr,
    restore_ptr,
    out_ptr,
    num_tokens,
    num_visible,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per group of ROWS output tokens of one sample."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = (d < D) & (t < num_tokens)
    rank = load_rank(restore_ptr, b, t, num_tokens)
    # The shuffle puts visible patches first, so a rank below K is a row of tokens.
    visible = rank < num_visible
    token = (b * (num_visible + 1) + rank + 1) * D + d
    x = tl.load(tokens_ptr + token, mask=inside & visible, other=0.0).to(tl.float32)
    # One read per program serves all of its masked rows.
    filler = tl.load(mask_token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    pos = tl.load(pos_ptr + t * D + d, mask=inside, other=0.0).to(tl.float32)
    # In fp32 and rounded once, which gives the bits of torch's cat and add.
    y = tl.where(visible, x, filler) + pos
    out = out_ptr + (b * num_tokens + t) * D + d
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def assemble_gradient_kernel(
    grad_ptr,
    restore_ptr,
    tokens_grad_ptr,
    partial_ptr,
    num_tokens,
    num_visible,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per chunk of ROWS output tokens of one sample."""
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    t = (chunk * ROWS + tl.arange(0, ROWS))[:, None]
    inside = (d < D) & (t < num_tokens)
    rank = load_rank(restore_ptr, b, t, num_tokens)
    visible = rank < num_visible
    grad = tl.load(grad_ptr + (b * num_tokens + t) * D + d, mask=inside, other=0.0)
    token = (b * (num_visible + 1) + rank + 1) * D + d
    tl.store(
        tokens_grad_ptr + token, grad.to(tokens_grad_ptr.dtype.element_ty), mask=inside & visible
    )
    # All masked patches share one token: its gradient is a sum over rows of every sample.
    # Partial sums go to memory and torch adds them up, in one order on every run.
    total = tl.sum(tl.where(visible, 0.0, grad.to(tl.float32)), axis=0)
    e = tl.arange(0, BLOCK)
    tl.store(partial_ptr + (b * tl.num_programs(0) + chunk) * D + e, total, mask=e < D)


def launch_assemble(
    out: Tensor, tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor
) -> None:
    """Fill `out` [B, L+1, D]."""
    batch, num_tokens, dim = out.shape
    block = triton.next_power_of_2(dim)
    launch(
        assemble_kernel,
        (triton.cdiv(num_tokens, FORWARD_ROWS), batch),
        tokens.contiguous(),
        mask_token.contiguous(),
        pos_embed.contiguous(),
        ids_restore,
        out,
        num_tokens,
        tokens.shape[1] - 1,
        D=dim,
        BLOCK=block,
        ROWS=FORWARD_ROWS,
        num_warps=warps_for(FORWARD_ROWS * block, out.element_size()),
    )


def launch_assemble_gradient(
    tokens_grad: Tensor, partial: Tensor, grad: Tensor, ids_restore: Tensor
) -> None:
    """Fill `tokens_grad` [B, K+1, D] and `partial` [B, ceil(T / GRADIENT_ROWS), D] fp32."""
    batch, num_tokens, dim = grad.shape
    block = triton.next_power_of_2(dim)
    launch(
        assemble_gradient_kernel,
        (triton.cdiv(num_tokens, GRADIENT_ROWS), batch),
        grad.contiguous(),
        ids_restore,
        tokens_grad,
        partial,
        num_tokens,
        tokens_grad.shape[1] - 1,
        D=dim,
        BLOCK=block,
        ROWS=GRADIENT_ROWS,
        num_warps=warps_for(GRADIENT_ROWS * block, grad.element_size()),
    )


@torch.library.custom_op("deepmim::decoder_assemble", mutates_args=())
def decoder_assemble_op(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor
) -> Tensor:
    """Decoder input [B, L+1, D] in the promoted dtype of the three floating inputs."""
    out = _output(tokens, mask_token, pos_embed, ids_restore)
    launch_assemble(out, tokens, mask_token, pos_embed, ids_restore)
    return out


@decoder_assemble_op.register_fake
def _output(tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    batch, num_patches = ids_restore.shape
    return tokens.new_empty(
        (batch, num_patches + 1, tokens.shape[2]),
        dtype=torch.promote_types(dtype, pos_embed.dtype),
    )


@torch.library.custom_op("deepmim::decoder_assemble_gradient", mutates_args=())
def decoder_assemble_gradient_op(
    grad: Tensor, ids_restore: Tensor, num_visible: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [B, K+1, D] in `dtype` and of the mask token [1, 1, D] in fp32."""
    batch, num_tokens, dim = grad.shape
    tokens_grad = grad.new_empty((batch, num_visible + 1, dim), dtype=dtype)
    chunks = triton.cdiv(num_tokens, GRADIENT_ROWS)
    partial = grad.new_empty((batch, chunks, dim), dtype=torch.float32)
    launch_assemble_gradient(tokens_grad, partial, grad, ids_restore)
    # fp32 until here: the sum has up to B * L terms.
    return tokens_grad, partial.sum(dim=(0, 1)).view(1, 1, dim)


@decoder_assemble_gradient_op.register_fake
def _(
    grad: Tensor, ids_restore: Tensor, num_visible: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, _, dim = grad.shape
    tokens_grad = grad.new_empty((batch, num_visible + 1, dim), dtype=dtype)
    return tokens_grad, grad.new_empty((1, 1, dim), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    tokens, mask_token, pos_embed, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_visible = tokens.shape[1] - 1
    ctx.dtypes = tokens.dtype, mask_token.dtype, pos_embed.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens_dtype, mask_dtype, pos_dtype = ctx.dtypes
    tokens_grad, mask_grad = decoder_assemble_gradient_op(
        grad, *ctx.saved_tensors, ctx.num_visible, tokens_dtype
    )
    # Positions are frozen in MAE; a learned table costs one more pass.
    pos_grad = grad.sum(dim=0, keepdim=True).to(pos_dtype) if ctx.needs_input_grad[2] else None
    return tokens_grad, mask_grad.to(mask_dtype), pos_grad, None


decoder_assemble_op.register_autograd(_backward, setup_context=_setup_context)
