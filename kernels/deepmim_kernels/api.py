"""The public functions: check the arguments, then run the Triton kernel or the reference.

Shapes: B batch, L patches, T tokens of a prediction (L + prefix, or K packed), K masked or visible
patches, C channels, H x W image, P patch side, D features of a prediction.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deepmim_kernels import _checks as check
from deepmim_kernels import reference
from deepmim_kernels._deprecated import accept_old_keywords
from deepmim_kernels._dispatch import TRITON_AVAILABLE, Backend, use_triton

# The package serves CPUs without Triton too: only these modules import it.
if TRITON_AVAILABLE:
    from deepmim_kernels.assemble import decoder_assemble_op
    from deepmim_kernels.cosine import masked_cosine_op
    from deepmim_kernels.mse import masked_mse_op
    from deepmim_kernels.patches import gather_patches_op

Mode = Literal["auto", "onepass", "recompute"]
Loss = Any  # a Tensor, or (Tensor, Tensor) with return_rows=True


@accept_old_keywords(
    hint=("expected_grad_scale",), pred2=("paired_pred",), hybrid=("mix_target", "mix_alpha")
)
def masked_mse(
    pred: Tensor,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    patch_size: int,
    norm_pix: bool = True,
    prefix_tokens: int = 0,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    paired_pred: Tensor | None = None,
    mix_target: Tensor | None = None,
    mix_alpha: float = 1.0,
    mode: Mode = "auto",
    expected_grad_scale: float | Tensor = 1.0,
    backend: Backend = "auto",
    return_rows: bool = False,
) -> Loss:
    """MAE's pixel loss: mean over a patch's values, then over the masked patches of the batch.

    Args:
        pred: [B, prefix_tokens + L, D] with `mask`, or packed [B, K, D] with `ids`;
            D = P*P*C in the order (row, column, channel). Any strides.
        images: [B, C, H, W]; floating and already normalized, or uint8 or uint16 with
            `pixel_mean` and `pixel_std` (C floats each, for pixels scaled to [0, 1]). Any
            strides, no gradient.
        mask: [B, L], 1 for a masked patch; fractional weights are allowed, bool and int too.
        ids: [B, K] int64, the patch that each packed prediction belongs to, below L.
        norm_pix: regress patches with mean 0 and unbiased variance 1 (eps 1e-6), else pixels.
        prefix_tokens: leading tokens of `pred` that are no patches, such as CLS.
        paired_pred: a second prediction added to `pred` (MIRL section 3), in its shape and dtype;
            both get the same gradient.
        mix_target: a second target, shaped like `pred`, such as a frozen model's reconstruction:
            the target becomes mix_alpha * target + (1 - mix_alpha) * mix_target (DeepMIM's hybrid
            target, section 3). No gradient.
        mix_alpha: share of the image in that target; needs `mix_target` where it is not 1.
        mode: `onepass` stores the gradient in the forward pass, `recompute` computes it in the
            backward pass; `auto` is `recompute` for fp16, which would underflow.
        expected_grad_scale: upstream gradient that `onepass` expects (loss scale / micro-batches);
            a tensor stays on the device. Any value is correct, the right one saves a pass over
            the gradient.
        return_rows: also return the weighted row losses [B, L] or [B, K], detached.

    Returns the loss [] in fp32 (float64 for float64 inputs); 0 when nothing is masked.
    Raises `ValueError` for shapes that do not fit and for images that require a gradient.
    """
    mean, std = check.pixel_scale(images, pixel_mean, pixel_std)
    num_patches = check.num_patches(images, patch_size)
    check.selection(pred, mask, ids, num_patches, prefix_tokens)
    check.same_batch("images", images, pred)
    expected = patch_size * patch_size * images.shape[1]
    check.require(
        pred.shape[2] == expected,
        f"pred has {pred.shape[2]} features; a patch of {patch_size}x{patch_size} pixels in "
        f"{images.shape[1]} channels needs {expected}: set the width of the prediction head",
    )
    check.no_gradient("images", images)
    check.require(
        mix_target is not None or mix_alpha == 1.0,
        f"mix_alpha={mix_alpha:g} mixes nothing; pass mix_target",
    )
    if mix_target is not None:
        check.same_shape("mix_target", mix_target, pred)
        check.no_gradient("mix_target", mix_target)
    if paired_pred is not None:
        check.same_shape("paired_pred", paired_pred, pred)
        check.require(
            paired_pred.dtype == pred.dtype,
            f"paired_pred is {paired_pred.dtype}; cast it to {pred.dtype}",
        )
    # Every floating input decides: one float64 tensor sends the call to the reference.
    others = [x for x in (paired_pred, mix_target) if x is not None]
    onepass = _onepass(mode, pred, paired_pred)
    if not use_triton(backend, pred, images, *others):
        loss, rows = reference.masked_mse(
            pred,
            paired_pred,
            mix_target,
            images,
            mask,
            ids,
            patch_size=patch_size,
            prefix_tokens=prefix_tokens,
            norm_pix=norm_pix,
            mix_alpha=mix_alpha,
            mean=mean,
            std=std,
        )
        return (loss, rows.detach()) if return_rows else loss
    loss, rows, _ = masked_mse_op(
        pred,
        paired_pred,
        mix_target,
        images,
        *_selection(mask, ids),
        _grad_scale(expected_grad_scale, pred),
        _count(mask),
        onepass,
        patch_size,
        prefix_tokens,
        norm_pix,
        mix_alpha,
        mean,
        std,
    )
    # The kernels have a row for CLS too, of loss 0; the reference never makes it.
    return (loss, rows[:, prefix_tokens:].detach()) if return_rows else loss


@accept_old_keywords(hint=("expected_grad_scale",))
def masked_cosine(
    pred: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    prefix_tokens: int = 0,
    teacher_prefix_tokens: int = 0,
    mode: Mode = "auto",
    expected_grad_scale: float | Tensor = 1.0,
    backend: Backend = "auto",
    return_rows: bool = False,
) -> Loss:
    """DeepMIM-CLIP's loss: 2 - 2 cos(pred, teacher), averaged over masked tokens of the batch.

    Args:
        pred: [B, prefix_tokens + L, D] with `mask`, or packed [B, K, D] with `ids`.
        teacher: [B, teacher_prefix_tokens + L, D], frozen features of every token.
        The rest is as in `masked_mse`.

    Returns the loss [] in fp32 (float64 for float64 inputs); 0 when nothing is masked.
    Raises `ValueError` for shapes that do not fit and for a teacher that requires a gradient.
    """
    num_patches = teacher.shape[1] - teacher_prefix_tokens
    check.selection(pred, mask, ids, num_patches, prefix_tokens)
    check.require(
        teacher.shape[0] == pred.shape[0] and teacher.shape[2] == pred.shape[2],
        f"teacher {tuple(teacher.shape)} does not match pred {tuple(pred.shape)}; "
        "batch and features must be equal",
    )
    check.no_gradient("teacher", teacher)
    onepass = _onepass(mode, pred)
    if not use_triton(backend, pred, teacher):
        loss, rows = reference.masked_cosine(
            pred,
            teacher,
            mask,
            ids,
            prefix_tokens=prefix_tokens,
            teacher_prefix_tokens=teacher_prefix_tokens,
        )
        return (loss, rows.detach()) if return_rows else loss
    loss, rows, _ = masked_cosine_op(
        pred,
        teacher,
        *_selection(mask, ids),
        _grad_scale(expected_grad_scale, pred),
        _count(mask),
        onepass,
        prefix_tokens,
        teacher_prefix_tokens,
    )
    return (loss, rows[:, prefix_tokens:].detach()) if return_rows else loss


def decoder_assemble(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    ids_restore: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """MAE's decoder input: CLS, tokens back in place, mask tokens elsewhere, plus positions.

    Args:
        tokens: [B, K+1, D], CLS first, then the visible tokens in shuffle order. Any strides.
        mask_token: [1, 1, D].
        pos_embed: [1, L+1, D].
        ids_restore: [B, L] int64, the place of patch n in the shuffled order.

    Returns [B, L+1, D] in the dtype that the three inputs promote to, as `torch.cat` does.
    Raises `ValueError` for shapes that do not fit.
    """
    batch, num_patches = ids_restore.shape
    dim = tokens.shape[2]
    check.require(
        tokens.shape[0] == batch and tokens.shape[1] <= num_patches + 1,
        f"tokens {tuple(tokens.shape)} do not match ids_restore {tuple(ids_restore.shape)}; "
        "expected [B, K+1, D] with K <= L",
    )
    for name, x, length in (
        ("mask_token", mask_token, 1),
        ("pos_embed", pos_embed, num_patches + 1),
    ):
        check.require(
            x.shape == (1, length, dim),
            f"{name} is {tuple(x.shape)}; tokens and ids_restore need (1, {length}, {dim})",
        )
    if use_triton(backend, tokens, mask_token, pos_embed):
        return decoder_assemble_op(tokens, mask_token, pos_embed, ids_restore.contiguous())
    return reference.decoder_assemble(tokens, mask_token, pos_embed, ids_restore)


def gather_patches(
    images: Tensor,
    ids: Tensor,
    *,
    patch_size: int,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Pixels of the patches `ids`, so that only visible patches are embedded.

    Features are ordered (channel, row, column), so `F.linear(x, conv.weight.flatten(1), conv.bias)`
    equals the patch convolution. Images as in `masked_mse`; ids [B, K] int64.

    Returns [B, K, C*P*P] in the dtype of floating images, fp32 for integers; no gradient.
    Raises `ValueError` for shapes that do not fit and for images that require a gradient.
    """
    mean, std = check.pixel_scale(images, pixel_mean, pixel_std)
    check.num_patches(images, patch_size)
    check.require(
        ids.ndim == 2 and ids.shape[0] == images.shape[0],
        f"ids {tuple(ids.shape)} must be [B, K] with B = {images.shape[0]} images",
    )
    check.patch_ids(ids)
    check.no_gradient("images", images)
    if use_triton(backend, images):
        return gather_patches_op(images, ids.contiguous(), patch_size, mean, std)
    return reference.gather_patches(images, ids, patch_size=patch_size, mean=mean, std=std)


def _selection(mask: Tensor | None, ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """mask as contiguous fp32 and ids as contiguous int64, as the kernels read them."""
    if ids is not None:
        return None, ids.contiguous()
    assert mask is not None, "one of mask and ids is given"
    return mask.to(torch.float32).contiguous(), None


def _count(mask: Tensor | None) -> Tensor | None:
    """Sum of the mask on the device, 1 where nothing is masked; None when packed (B * K)."""
    if mask is None:
        return None
    # On the device: reading the count on the host would stop the stream at every loss.
    count = mask.sum(dtype=torch.float32)
    return count.masked_fill(count == 0, 1.0)


def _grad_scale(scale: float | Tensor, pred: Tensor) -> Tensor | None:
    """The expected upstream gradient as an fp32 scalar on the device; None for 1."""
    if isinstance(scale, Tensor):
        return scale.to(torch.float32)
    # No tensor for the common case, which saves the launch that would fill it.
    return None if scale == 1.0 else torch.full((), scale, device=pred.device)


def _onepass(mode: str, *preds: Tensor | None) -> bool:
    """Whether the forward pass also stores the gradient of these predictions."""
    check.require(
        mode in ("auto", "onepass", "recompute"),
        f"mode={mode!r} is unknown; use 'auto', 'onepass' or 'recompute'",
    )
    given = [pred for pred in preds if pred is not None]
    # Under no_grad a stored gradient would be written for nobody.
    wanted = mode == "onepass" or (mode == "auto" and given[0].dtype != torch.float16)
    return wanted and torch.is_grad_enabled() and any(pred.requires_grad for pred in given)
