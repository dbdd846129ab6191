"""timm's image transforms of fine-tuning and evaluation, which are the official code's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from deepmim_scale.errors import UserError

# RGB image -> float32 [3, S, S], normalized.
Transform = Callable[[Image.Image], Tensor]
# Above this input size nothing is cut off in evaluation.
FULL_VIEW_ABOVE = 224
CROP_SHARE = 0.875


def train_transform(
    size: int, *, auto_augment: str, min_crop: float, flip: float, erase: float
) -> Transform:
    """Crop, flip, RandAugment, normalize, erase; draws from the global random streams.

    UserError if timm does not know the policy.
    """
    try:
        transform = create_transform(
            size,
            is_training=True,
            scale=(min_crop, 1.0),
            hflip=flip,
            color_jitter=None,  # type: ignore[arg-type]  # its type leaves None out
            auto_augment=auto_augment or None,
            interpolation="bicubic",
            re_prob=erase,
            re_mode="pixel",
            re_count=1,
        )
    except (AssertionError, ValueError) as error:
        reason = str(error) or "timm cannot read it"
        raise UserError(
            f"auto_augment={auto_augment}: {reason}; as rand-m9-mstd0.5-inc1, or '' for none"
        ) from None
    _allow_black(transform)
    return transform


def _allow_black(transform: Any) -> None:
    """Let RandAugment posterize to 0 bits, which Pillow refuses since release 13."""
    for part in transform.transforms:
        for operation in getattr(part, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _or_black(operation.aug_fn)


def _or_black(posterize: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    def apply(image: Image.Image, bits: int, **options: Any) -> Image.Image:
        if bits < 1:
            return Image.new(image.mode, image.size)
        return posterize(image, bits, **options)

    return apply


def crop_share(size: int, given: float = 0.0) -> float:
    """Share of the resized short side that evaluation looks at; `given` unless it is 0."""
    return given or (1.0 if size > FULL_VIEW_ABOVE else CROP_SHARE)


def evaluation_transform(size: int, share: float = 0.0) -> Transform:
    """Short side to int(size / share), bicubic, central square, normalize; 0 is the default."""
    return create_transform(
        size, is_training=False, crop_pct=crop_share(size, share), interpolation="bicubic"
    )
