"""Masked mean squared error against the pixels of the image, fused.

    x[n, d]  = pixel of patch n, d = (row * P + column) * C + channel
    t        = (x - mean(x)) / sqrt(var(x) + 1e-6)          norm_pix: per patch, unbiased variance
    t        = mix_alpha * t + (1 - mix_alpha) * mix_target   optional: DeepMIM's hybrid target
    r        = pred (+ paired_pred) - t
    loss     = sum_n m[n] * mean_d(r^2) / sum_n m[n]
    dloss/dp = 2 * r * m[n] / (D * sum m)                   one tensor for pred and paired_pred

Shapes: B batch, L patches, T tokens of a prediction (L + prefix, or K packed), K masked patches,
C channels, H x W image, P patch side, D = P * P * C.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deepmim_kernels._common import (
    launch,
    load_pixels,
    row_scale,
    row_weight,
    warps_for,
)
from deepmim_kernels.row_loss import register_row_loss


@triton.jit
def masked_mse_kernel(
    pred_ptr,
    paired_ptr,
    mix_target_ptr,
    images_ptr,
    mask_ptr,
    ids_ptr,
    upstream_ptr,
    count_ptr,
    rows_ptr,
    grad_ptr,
    image_b,
    image_c,
    image_y,
    image_x,
    mix_alpha,
    P: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    GRID_WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    NORM_PIX: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
):
    """One program per token; null pointers switch their parts off at compile time."""
    D: tl.constexpr = P * P * C
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
        # MAE orders a patch (row, column, channel). Lanes follow the prediction, whose wide
        # loads and stores are most of the bytes; the pixels are gathered.
        n = tl.load(ids_ptr + row).to(tl.int32) if ids_ptr is not None else t - PREFIX
        c = d % C
        y = (n // GRID_WIDTH) * P + d // (C * P)
        x = (n % GRID_WIDTH) * P + (d // C) % P
        pixels = images_ptr + b * image_b + c * image_c + y * image_y + x * image_x
        target = load_pixels(pixels, c, inside, MEAN, STD, C)
        if NORM_PIX:
            # Two passes over registers: E[x^2] - E[x]^2 loses every digit on a flat patch.
            centered = tl.where(inside, target - tl.sum(target, axis=0) / D, 0.0)
            variance = tl.sum(centered * centered, axis=0) / (D - 1)
            target = centered / tl.sqrt(variance + 1e-6)
        if mix_target_ptr is not None:
            generated = tl.load(mix_target_ptr + row * D + d, mask=inside, other=0.0)
            target = mix_alpha * target + (1.0 - mix_alpha) * generated.to(tl.float32)
        # Lanes beyond D read 0 and have target 0, so that they add nothing to the row.
        pred = tl.load(pred_ptr + row * D + d, mask=inside, other=0.0)
        residual = pred.to(tl.float32) - target
        if paired_ptr is not None:
            paired_pred = tl.load(paired_ptr + row * D + d, mask=inside, other=0.0)
            residual += paired_pred.to(tl.float32)
        if rows_ptr is not None:
            tl.store(rows_ptr + row, weight * tl.sum(residual * residual, axis=0) / D)
        if grad_ptr is not None:
            # The scale is applied before rounding: at 2 / (768 * 18816) fp16 would underflow.
            scale = row_scale(upstream_ptr, count_ptr) * weight * (2.0 / D)
            gradient = (residual * scale).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * D + d, gradient, mask=inside)


def launch_masked_mse(
    rows: Tensor | None,
    grad: Tensor | None,
    pred: Tensor,
    paired_pred: Tensor | None,
    mix_target: Tensor | None,
    images: Tensor,
    mask: Tensor | None,
    ids: Tensor | None,
    upstream: Tensor | None,
    count: Tensor | None,
    patch_size: int,
    prefix_tokens: int,
    norm_pix: bool,
    mix_alpha: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Fill `rows` [B, T] fp32 and `grad` [B, T, D]; either may be None."""
    batch, num_tokens, dim = pred.shape
    block = triton.next_power_of_2(dim)
    launch(
        masked_mse_kernel,
        (num_tokens, batch),
        # The images keep their strides (channels-last, crops); a copy would cost the saving.
        pred.contiguous(),
        None if paired_pred is None else paired_pred.contiguous(),
        None if mix_target is None else mix_target.contiguous(),
        images,
        mask,
        ids,
        upstream,
        count,
        rows,
        grad,
        *images.stride(),
        mix_alpha,
        P=patch_size,
        C=images.shape[1],
        BLOCK=block,
        GRID_WIDTH=images.shape[3] // patch_size,
        PREFIX=prefix_tokens,
        NORM_PIX=norm_pix,
        MEAN=tuple(mean),
        STD=tuple(std),
        num_warps=warps_for(block, pred.element_size()),
    )


masked_mse_op = register_row_loss(
    "masked_mse",
    launch_masked_mse,
    inputs="Tensor pred, Tensor? paired_pred, Tensor? mix_target, Tensor images, Tensor? mask, "
    "Tensor? ids",
    settings="int patch_size, int prefix_tokens, bool norm_pix, float mix_alpha, float[] mean, "
    "float[] std",
    has_pair=True,
)
