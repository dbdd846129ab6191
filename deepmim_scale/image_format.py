"""What images are made of: channels, size, bits, and the statistics that normalize them."""

from __future__ import annotations

from typing import NamedTuple


class PixelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# With which MAE, DeepMIM and MIRL normalize their input.
IMAGENET = PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageFormat(NamedTuple):
    """Images as they reach the model, [C, H, W] of 8 or 16 bits."""

    channels: int
    height: int
    width: int
    bits: int = 8

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.height, self.width

    @property
    def is_rgb(self) -> bool:
        """Whether any picture can be converted to it; other formats are taken as they are."""
        return (self.channels, self.bits) == (3, 8)

    @property
    def kind(self) -> str:
        """In words."""
        return f"{self.channels} channels of {self.bits} bits"

    @property
    def num_bytes(self) -> int:
        """Of one image."""
        return self.channels * self.height * self.width * self.bits // 8


RGB = ImageFormat(3, 224, 224)


def show_size(size: int | tuple[int, int]) -> str:
    """A size as it is typed."""
    return str(size) if isinstance(size, int) else " ".join(map(str, size))
