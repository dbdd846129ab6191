"""Argument checks of the public functions: what is wrong, and what to do about it, in one line."""

from collections.abc import Sequence

import torch
from torch import Tensor


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# Silently returning no gradient would train nothing and say nothing.
def no_gradient(name: str, tensor: Tensor) -> None:
    require(
        not tensor.requires_grad,
        f"{name} requires a gradient, which the fused kernels do not compute; detach it",
    )


def same_shape(name: str, tensor: Tensor, pred: Tensor) -> None:
    require(
        tensor.shape == pred.shape,
        f"{name} is {tuple(tensor.shape)}; it must be shaped like pred, {tuple(pred.shape)}",
    )


def num_patches(images: Tensor, patch_size: int) -> int:
    require(
        images.ndim == 4, f"images must be [B, C, H, W], not {images.ndim}-d; add the batch axis"
    )
    height, width = images.shape[2:]
    require(
        height % patch_size == 0 and width % patch_size == 0,
        f"images of {height}x{width} cannot be cut into patches of {patch_size}; resize them",
    )
    return (height // patch_size) * (width // patch_size)


def pixel_scale(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """pixel_mean and pixel_std as lists, empty for images that are normalized already."""
    # Statistics for floating images would normalize them a second time.
    if images.is_floating_point():
        require(
            mean is None and std is None,
            f"pixel_mean and pixel_std are for uint8 images (or uint16), not {images.dtype}; leave "
            "them out",
        )
        return [], []
    if images.dtype not in (torch.uint8, torch.uint16) or mean is None or std is None:
        raise ValueError(
            f"images are {images.dtype}; pass uint8 with pixel_mean and pixel_std (or uint16), "
            "or normalize them to floating point"
        )
    channels = images.shape[1]
    require(
        len(mean) == channels and len(std) == channels,
        f"pixel_mean and pixel_std have {len(mean)} and {len(std)} values; images have {channels} "
        "channels",
    )
    return list(mean), list(std)


def same_batch(name: str, tensor: Tensor, pred: Tensor) -> None:
    require(
        tensor.shape[0] == pred.shape[0],
        f"{name} and pred have batches of {tensor.shape[0]} and {pred.shape[0]}; "
        "they must be equal",
    )


def patch_ids(ids: Tensor) -> None:
    # torch.gather takes int64 only; the kernels would take any type, and truncate floats.
    require(ids.dtype == torch.int64, f"ids are {ids.dtype}; pass torch.int64")


def selection(
    pred: Tensor, mask: Tensor | None, ids: Tensor | None, num_patches: int, prefix_tokens: int
) -> None:
    """What shapes tell of `mask` or `ids`; that ids lie below L is not read from the device."""
    require(pred.ndim == 3, f"pred must be [B, T, D], not {pred.ndim}-d")
    require((mask is None) != (ids is None), "pass exactly one of mask and ids")
    batch, num_tokens, _ = pred.shape
    # Packed predictions have no place for CLS: the caller has taken the masked rows out.
    if ids is not None:
        require(
            ids.shape == (batch, num_tokens) and prefix_tokens == 0,
            f"ids {tuple(ids.shape)} and prefix_tokens={prefix_tokens} do not fit packed "
            f"pred {tuple(pred.shape)}; pass ids [B, K], prefix_tokens 0",
        )
        patch_ids(ids)
        require(
            num_tokens <= num_patches,
            f"ids name {num_tokens} patches of {num_patches}; each masked patch comes once",
        )
        return
    assert mask is not None, "one of mask and ids is given"
    require(
        mask.shape == (batch, num_patches) and num_tokens == num_patches + prefix_tokens,
        f"mask {tuple(mask.shape)} and pred {tuple(pred.shape)} do not fit {num_patches} patches "
        f"and prefix_tokens={prefix_tokens}; mask is [B, L] and pred [B, L + prefix_tokens, D]",
    )
