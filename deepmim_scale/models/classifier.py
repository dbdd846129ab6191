"""timm's VisionTransformer as a classifier of whole images."""

from __future__ import annotations

from typing import Literal, Protocol

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

Pool = Literal["mean", "class"]
# What timm calls them; any size of this family can be asked of the one name.
POOLS = {"mean": "avg", "class": "token"}
TIMM_NAME = "vit_base_patch16_224"


class Sizes(Protocol):
    """What a ViT is made with: a `ModelConfig`, or the sizes that a file tells."""

    @property
    def img_size(self) -> int | tuple[int, int]:
        """Side of an image, or height and width, pixels."""

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""

    @property
    def embed_dim(self) -> int:
        """D."""

    @property
    def depth(self) -> int:
        """Blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads."""

    @property
    def mlp_ratio(self) -> float:
        """Width of the MLP over D."""

    @property
    def in_chans(self) -> int:
        """Channels of an image."""


def build_classifier(
    model: Sizes, num_classes: int, pool: Pool = "mean", drop_path: float = 0.0, seed: int = 0
) -> nn.Module:
    """Normalized images [B, C, H, W] -> logits [B, num_classes]; timm's random weights of a seed.

    `mean` norms the mean of the patch tokens (`fc_norm`), `class` norms all tokens (`norm`) and
    takes the class token's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(
            TIMM_NAME,
            num_classes=num_classes,
            global_pool=POOLS[pool],
            drop_path_rate=drop_path,
            img_size=model.img_size,
            patch_size=model.patch_size,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            mlp_ratio=model.mlp_ratio,
            in_chans=model.in_chans,
        )


def resize_position_table(
    table: Tensor, grid: int | tuple[int, int], old: tuple[int, int] | None = None
) -> Tensor:
    """Table [1, 1 + g * g, D] -> [1, 1 + grid * grid, D]: bicubic, not antialiased, as official.

    A grid that is no square is (rows, columns), the table's own (`old`) too.
    """
    new = [grid, grid] if isinstance(grid, int) else list(grid)
    size = None if old is None else list(old)
    if new == size:
        return table
    return resample_abs_pos_embed(table, new, size, num_prefix_tokens=1, antialias=False)
