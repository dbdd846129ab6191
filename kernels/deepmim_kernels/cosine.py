"""Masked cosine loss against a teacher's token features, fused.

    l[n]     = 2 - 2 * cos(pred[n], teacher[n])         no eps, as in DeepMIM's released code
    loss     = sum_n m[n] * l[n] / sum_n m[n]
    dloss/dp = 2 * (cos * p / |p| - t / |t|) / |p| * m[n] / sum m

Shapes: B batch, L patches, T tokens of a prediction (L + prefix, or K packed), K masked patches,
D features.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from deepmim_kernels._common import launch, row_scale, row_weight, warps_for
from deepmim_kernels.row_loss import register_row_loss


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
    # 64 bits: the elements of a large batch exceed 2^31.
    b = tl.program_id(1).to(tl.int64)
    row = b * num_tokens + t
    d = tl.arange(0, BLOCK)
    inside = d < D
    weight = row_weight(mask_ptr, b, t, num_tokens, PREFIX)
    # Skipped, not multiplied by 0: nothing but the mask is read, and NaN cannot spread.
    if weight == 0.0:
        if rows_ptr is not None:
            tl.store(rows_ptr + row, 0.0)
        if grad_ptr is not None:
            zeros = tl.zeros((BLOCK,), dtype=grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * D + d, zeros, mask=inside)
    else:
        n = tl.load(ids_ptr + row).to(tl.int32) if ids_ptr is not None else t - PREFIX
        teacher_row = b * teacher_tokens + n + TEACHER_PREFIX
        # 16-bit inputs are summed in fp32; a sum of 512 squares in fp16 can overflow.
        p = tl.load(pred_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(teacher_ptr + teacher_row * D + d, mask=inside, other=0.0).to(tl.float32)
        inverse_p = 1.0 / tl.sqrt(tl.sum(p * p, axis=0))
        inverse_q = 1.0 / tl.sqrt(tl.sum(q * q, axis=0))
        # One read of both rows serves the loss and the gradient: they stay in registers.
        cosine = tl.sum(p * q, axis=0) * inverse_p * inverse_q
        if rows_ptr is not None:
            tl.store(rows_ptr + row, weight * (2.0 - 2.0 * cosine))
        if grad_ptr is not None:
            # The scale first, rounding last: small gradients survive in 16 bits.
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
        # The kernel knows no strides of these; contiguous tensors, as in training, stay uncopied.
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


masked_cosine_op = register_row_loss(
    "masked_cosine",
    launch_masked_cosine,
    inputs="Tensor pred, Tensor teacher, Tensor? mask, Tensor? ids",
    settings="int prefix_tokens, int teacher_prefix_tokens",
    has_pair=False,
)
