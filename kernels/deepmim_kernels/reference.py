"""The definition of every operation in plain torch: any floating dtype, any device, autograd.

The tests, the benchmarks and the CPU path all use these functions; the kernels must equal them.
Formulas follow the official MAE and DeepMIM code (`models_mae.py`); in float64 they agree with it
to rounding. One deliberate difference: with nothing masked the loss is 0 where theirs is 0 / 0.

Shapes: B batch, L patches, T tokens of a prediction (L + prefix, or K packed), K masked patches,
C channels, H x W image, P patch side, D features of a prediction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Floats = Sequence[float]


def normalize(images: Tensor, mean: Floats, std: Floats, dtype: torch.dtype) -> Tensor:
    """Images [B, C, H, W] in `dtype`; with `mean` and `std`, integers v as (v / top - mean) / std.

    `top` is 255 for uint8 and 65535 for uint16.
    """
    # The cast comes first: bytes would be divided in the default dtype.
    x = images.to(dtype)
    if not mean:
        return x
    channels = (1, len(mean), 1, 1)
    return (x / torch.iinfo(images.dtype).max - x.new_tensor(mean).view(channels)) / x.new_tensor(
        std
    ).view(channels)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of every patch in MAE's order (row, column, channel): [B, L, P*P*C]."""
    batch, channels, height, width = images.shape
    p = patch_size
    x = images.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def normalize_patches(patches: Tensor) -> Tensor:
    """Patches [B, L, D] with mean 0 and unbiased variance 1, as MAE's norm_pix_loss."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    # MAE writes ** 0.5 of variance + eps; the same expression gives the same bits.
    return (patches - mean) / (variance + 1.0e-6) ** 0.5


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, K] of x [B, L, D], as [B, K, D]."""
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def fill_unmasked(x: Tensor, weights: Tensor | None, value: float) -> Tensor:
    """x [B, L, D] with `value` in the rows of weight 0, which then get gradient 0.

    A product with the weights would not do: 0 * NaN is NaN, in the loss and in every gradient.
    """
    return x if weights is None else x.masked_fill((weights == 0).unsqueeze(-1), value)


def masked_mean(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(rows * weights) / sum(weights) over the batch, and the weighted rows [B, L] or [B, K]."""
    if weights is None:
        return rows.mean(), rows
    weighted = rows * weights
    # Nothing masked is 0 / 0 in the official code; here the loss and its gradient are 0.
    count = weights.sum()
    return weighted.sum() / count.masked_fill(count == 0, 1.0), weighted


def masked_mse(
    pred: Tensor,
    paired_pred: Tensor | None,
    mix_target: Tensor | None,
    images: Tensor,
    mask: Tensor | None,
    ids: Tensor | None,
    *,
    patch_size: int,
    prefix_tokens: int,
    norm_pix: bool,
    mix_alpha: float,
    mean: Floats,
    std: Floats,
) -> tuple[Tensor, Tensor]:
    """Loss [] and weighted row losses [B, L] or [B, K]; at least fp32 inside."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    if images.is_floating_point():
        dtype = torch.promote_types(dtype, images.dtype)
    target = patchify(normalize(images, mean, std, dtype), patch_size)
    if ids is not None:
        target = take_rows(target, ids)
    # After the gather, so that only patches that count are normalized.
    if norm_pix:
        target = normalize_patches(target)
    if mix_target is not None:
        # A number times a 16-bit tensor would be rounded to 16 bits.
        mix_target = mix_target[:, prefix_tokens:].to(dtype)
        target = mix_alpha * target + (1 - mix_alpha) * mix_target
    residual = pred[:, prefix_tokens:] - target
    if paired_pred is not None:
        residual = residual + paired_pred[:, prefix_tokens:]
    weights = None if mask is None else mask.to(dtype)
    rows = (fill_unmasked(residual, weights, 0.0) ** 2).mean(dim=-1)
    return masked_mean(rows, weights)


def masked_cosine(
    pred: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    ids: Tensor | None,
    *,
    prefix_tokens: int,
    teacher_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Loss [] and weighted row losses 2 - 2 cos [B, L] or [B, K]; at least fp32 inside."""
    dtype = torch.promote_types(torch.promote_types(pred.dtype, teacher.dtype), torch.float32)
    pred, teacher = pred[:, prefix_tokens:], teacher[:, teacher_prefix_tokens:]
    if ids is not None:
        teacher = take_rows(teacher, ids)
    weights = None if mask is None else mask.to(dtype)
    # Before the division: what it makes of a row of zeros is NaN, and so is its gradient.
    pred, teacher = fill_unmasked(pred, weights, 1.0), fill_unmasked(teacher, weights, 1.0)
    pred = pred / torch.linalg.vector_norm(pred, dim=-1, keepdim=True, dtype=dtype)
    teacher = teacher / torch.linalg.vector_norm(teacher, dim=-1, keepdim=True, dtype=dtype)
    rows = 2 - 2 * (pred * teacher).sum(dim=-1)
    return masked_mean(rows, weights)


def decoder_assemble(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor
) -> Tensor:
    """MAE's decoder input [B, L+1, D]: CLS, un-shuffled tokens with mask tokens, positions."""
    batch, num_patches = ids_restore.shape
    # Expanded, not repeated: the mask token is read in place.
    missing = num_patches + 1 - tokens.shape[1]
    patches = torch.cat([tokens[:, 1:], mask_token.expand(batch, missing, -1)], dim=1)
    return torch.cat([tokens[:, :1], take_rows(patches, ids_restore)], dim=1) + pos_embed


def gather_patches(
    images: Tensor, ids: Tensor, *, patch_size: int, mean: Floats, std: Floats
) -> Tensor:
    """Pixels of the patches `ids` in the order of a convolution's weight: [B, K, C*P*P]."""
    dtype = images.dtype if images.is_floating_point() else torch.float32
    x = normalize(images, mean, std, dtype)
    batch, channels, height, width = x.shape
    p = patch_size
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return take_rows(x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p), ids)
