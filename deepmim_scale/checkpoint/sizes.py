"""The sizes of an encoder, and how a file of its weights tells them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from deepmim_scale.config import ModelConfig

# Entries of the safetensors header, as JSON.
SIZES, CLASSES = "sizes", "classes"


@dataclass(frozen=True)
class EncoderSizes:
    """What a ViT is made with; num_heads is 0 where no one knows."""

    img_size: int | tuple[int, int]
    """Side, or height and width where they differ."""
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    in_chans: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        size = self.img_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch_size, width // self.patch_size

    @classmethod
    def of(cls, config: ModelConfig) -> EncoderSizes:
        """The sizes of a model's encoder."""
        return cls(**{name: getattr(config, name) for name in cls.__annotations__})


def header_of(sizes: EncoderSizes, classes: tuple[str, ...] = ()) -> dict[str, str]:
    """What a file's header says, so that a reader need not guess."""
    content = {SIZES: json.dumps(asdict(sizes))}
    return content | ({CLASSES: json.dumps(classes)} if classes else {})


def sizes_in(header: Mapping[str, str]) -> EncoderSizes | None:
    """The sizes that a header tells."""
    if SIZES not in header:
        return None
    values = json.loads(header[SIZES])
    size = values["img_size"]
    return EncoderSizes(**values | {"img_size": tuple(size) if isinstance(size, list) else size})
