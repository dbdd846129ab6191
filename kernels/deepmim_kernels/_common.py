"""What the Triton kernels share: the launch, pixel loading, row weights and the late rescale."""

# mypy: allow-untyped-defs

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The ahead-of-time compiler puts a function here and is told of launches instead of the GPU, so
# that it compiles the very calls that training makes.
recorder: Callable[..., None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any
) -> None:
    """Run `kernel` on the device of its first argument, or hand the call to the recorder."""
    if recorder is not None:
        recorder(kernel, grid, *args, num_warps=num_warps, **constants)
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, num_warps=num_warps, **constants)


def warps_for(block: int, itemsize: int) -> int:
    """Warps that give every lane one 128-bit access to a row of `block` elements, at most 8."""
    # The bound of 8 is a guess that keeps several programs on an SM: stage 2 of
    # benchmarks/gpu_check.py sweeps it.
    return min(max(block * itemsize // (32 * 16), 1), 8)


@triton.jit
def load_pixels(pointers, c, inside, MEAN: tl.constexpr, STD: tl.constexpr, C: tl.constexpr):
    """Pixels as fp32; integers become (v / top - mean[c]) / std[c] when MEAN is not empty."""
    x = tl.load(pointers, mask=inside, other=0).to(tl.float32)
    if len(MEAN) > 0:
        TOP: tl.constexpr = 255.0 if pointers.dtype.element_ty == tl.uint8 else 65535.0
        # Constants instead of two tables in memory: C is at most a handful.
        mean = tl.zeros_like(x)
        scale = tl.zeros_like(x)
        for i in tl.static_range(C):
            # top goes into both constants, so that a pixel costs one subtraction and one product.
            mean = tl.where(c == i, TOP * MEAN[i], mean)
            scale = tl.where(c == i, 1.0 / (TOP * STD[i]), scale)
        x = (x - mean) * scale
    # Lanes beyond the patch hold -mean * scale by now, which would enter its statistics.
    return tl.where(inside, x, 0.0)


@triton.jit
def row_weight(mask_ptr, b, t, num_tokens, PREFIX: tl.constexpr):
    """Weight of token t: its mask value, 0 for prefix tokens, 1 for packed predictions."""
    if mask_ptr is None:
        weight = 1.0
    else:
        # CLS lies before the mask: its load is masked off, not moved.
        n = t - PREFIX
        weight = tl.load(mask_ptr + b * (num_tokens - PREFIX) + n, mask=n >= 0, other=0.0)
    return weight


@triton.jit
def row_scale(upstream_ptr, count_ptr):
    """d(total loss)/d(row loss): the upstream gradient over the number of masked patches."""
    upstream = 1.0
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr)
    if count_ptr is None:
        # Packed: one program per masked patch, so the grid knows their number.
        count = (tl.num_programs(0) * tl.num_programs(1)).to(tl.float32)
    else:
        count = tl.load(count_ptr)
    return upstream / count


@triton.jit
def rescale_kernel(grad_ptr, upstream_ptr, expected_ptr, numel, BLOCK: tl.constexpr):
    ratio = tl.load(upstream_ptr)
    if expected_ptr is not None:
        ratio = ratio / tl.load(expected_ptr)
    # Decided on the device: reading the ratio on the host would stop the stream at every loss.
    if ratio != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < numel
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offsets, (grad * ratio).to(grad_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("deepmim::rescale_", mutates_args={"grad"})
def rescale_(grad: Tensor, upstream: Tensor, expected_scale: Tensor | None) -> None:
    """grad *= upstream / expected_scale for a contiguous `grad`; free when the two are equal."""
    block = 4096
    grid = (triton.cdiv(grad.numel(), block),)
    launch(
        rescale_kernel, grid, grad, upstream, expected_scale, grad.numel(), BLOCK=block, num_warps=4
    )


@rescale_.register_fake
def _(grad: Tensor, upstream: Tensor, expected_scale: Tensor | None) -> None:
    return None


def onepass_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient stored by a one-pass forward, brought to the upstream scale; once only."""
    if ctx.spent:
        raise RuntimeError(
            "second backward through a one-pass masked loss, whose gradient is rescaled in place; "
            "use mode='recompute'"
        )
    ctx.spent = True
    grad, expected_scale = ctx.saved_tensors
    if type(grad) is Tensor:
        rescale_(grad, upstream, expected_scale)
        return grad
    # Traced: a graph may not write to a tensor that another one returned, and it fuses this.
    ratio = upstream if expected_scale is None else upstream / expected_scale
    return (grad.float() * ratio).to(grad.dtype)
