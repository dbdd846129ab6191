"""Pixels of the visible patches, gathered and normalized before the patch embedding.

    out[b, k, (c * P + row) * P + column] = pixel (c, row, column) of patch ids[b, k]

This is the order of `conv.weight.flatten(1)`, so a Linear with that weight is the patch embedding.
Shapes: B batch, L patches, K visible patches, C channels, H x W image, P patch side.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepmim_kernels._common import launch, load_pixels, warps_for


@triton.jit
def gather_patches_kernel(
    images_ptr,
    ids_ptr,
    out_ptr,
    image_b,
    image_c,
    image_y,
    image_x,
    P: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    GRID_WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
):
    """One program per gathered patch."""
    D: tl.constexpr = P * P * C
    # 64 bits: the elements of a large batch exceed 2^31.
    b = tl.program_id(1).to(tl.int64)
    row = b * tl.num_programs(0) + tl.program_id(0)
    n = tl.load(ids_ptr + row).to(tl.int32)
    d = tl.arange(0, BLOCK)
    inside = d < D
    # The order of the convolution's weight (channel, row, column), unlike the loss's targets.
    c = d // (P * P)
    y = (n // GRID_WIDTH) * P + (d // P) % P
    x = (n % GRID_WIDTH) * P + d % P
    pixels = images_ptr + b * image_b + c * image_c + y * image_y + x * image_x
    values = load_pixels(pixels, c, inside, MEAN, STD, C)
    tl.store(out_ptr + row * D + d, values.to(out_ptr.dtype.element_ty), mask=inside)


def launch_gather_patches(
    out: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Fill `out` [B, K, C*P*P]."""
    batch, num_visible, dim = out.shape
    block = triton.next_power_of_2(dim)
    launch(
        gather_patches_kernel,
        (num_visible, batch),
        # Uncopied: the strides carry channels-last batches and slices.
        images,
        ids,
        out,
        *images.stride(),
        P=patch_size,
        C=images.shape[1],
        BLOCK=block,
        GRID_WIDTH=images.shape[3] // patch_size,
        MEAN=tuple(mean),
        STD=tuple(std),
        num_warps=warps_for(block, out.element_size()),
    )


@torch.library.custom_op("deepmim::gather_patches", mutates_args=())
def gather_patches_op(
    images: Tensor, ids: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Pixels [B, K, C*P*P] in the dtype of floating images, fp32 for integers."""
    out = _output(images, ids, patch_size, mean, std)
    launch_gather_patches(out, images, ids, patch_size, mean, std)
    return out


@gather_patches_op.register_fake
def _output(
    images: Tensor, ids: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    dtype = images.dtype if images.is_floating_point() else torch.float32
    return images.new_empty((*ids.shape, images.shape[1] * patch_size**2), dtype=dtype)
