"""timm's image transforms of fine-tuning and evaluation, which are the official code's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from deepmim_scale.errors import UserError
from deepmim_scale.images import IMAGENET_MEAN, IMAGENET_STD

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


class OneTryCrop:
    """A crop of one draw, its sides cut to the image's, as MAE's linear probe takes it."""

    def __init__(self, size: int, min_area: float) -> None:
        self._size, self._min_area = size, min_area

    def __call__(self, image: Image.Image) -> Image.Image:
        """Draws from the stream of `random`."""
        width, height = image.size
        area = width * height * random.uniform(self._min_area, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide = max(min(round(math.sqrt(area * ratio)), width), 1)
        high = max(min(round(math.sqrt(area / ratio)), height), 1)
        left, top = random.randint(0, width - wide), random.randint(0, height - high)
        part = image.crop((left, top, left + wide, top + high))
        return part.resize((self._size, self._size), Image.Resampling.BICUBIC)


def probe_transform(size: int, *, min_crop: float, flip: float) -> Transform:
    """Crop, flip and normalize, as MAE trains a linear probe; draws from the global streams."""
    return transforms.Compose(
        [
            OneTryCrop(size, min_crop),
            transforms.RandomHorizontalFlip(flip),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


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
