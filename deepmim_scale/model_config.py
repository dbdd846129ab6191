"""What a model is: a frozen pydantic model, checked before any process group starts (no torch)."""

from __future__ import annotations

import operator
import re
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, field_validator, model_validator

from deepmim_scale.errors import UserError
from deepmim_scale.image_format import IMAGENET, ImageFormat, PixelStatistics, show_size
from deepmim_scale.methods import METHODS, method_of
from deepmim_scale.methods.base import require, require_divisible
from deepmim_scale.objectives import ALIASES, find_objective, objective_of
from deepmim_scale.settings import FrozenConfig, shown_as

NUM_EVEN_TAPS = 4
# Taps that are still to be spread: a negative count.
UNSET_TAPS = (-NUM_EVEN_TAPS,)
_TAPS_RULE = "must be even, even:N (N from 1) or numbers as 6,8,10,12"

Size = Annotated[int, Field(gt=0, le=65536)]
"""Pixels, widths and heads: beyond is a slip of the keyboard."""


def _size_from_words(words: list[str]) -> int | tuple[int, ...]:
    numbers = tuple(int(number) for number in " ".join(words).replace(",", " ").split())
    return numbers[0] if len(numbers) == 1 else numbers


ImageSize = Annotated[
    Size | tuple[Size, Size],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="SIDE|HEIGHT WIDTH",
        instance_from_str=_size_from_words,
        is_instance=lambda value: isinstance(value, int | tuple),
        str_from_instance=lambda value: show_size(value).split(),
    ),
]
"""A number, or two that differ."""


def _taps_from_words(words: list[str]) -> tuple[int, ...]:
    # `even` cannot be spread before the depth is known: it travels as a negative count.
    text = ",".join(words)
    even = re.fullmatch("even(:([1-9][0-9]{0,3}))?", text)
    if even:
        return (-int(even[2] or NUM_EVEN_TAPS),)
    try:
        return tuple(int(number) for number in text.replace(", ", ",").split(","))
    except ValueError:
        raise UserError(f"taps={text}: {_TAPS_RULE}") from None


Taps = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="even|even:N|6,8,10,12",
        instance_from_str=_taps_from_words,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


class ModelConfig(FrozenConfig):
    """Encoder, decoders, mask and target of one model."""

    method: Annotated[str, tyro.conf.arg(metavar="mae|deepmim|mirl")] = "deepmim"
    """mae: one decoder at the end; deepmim: one after each tap; mirl: pairs of segments."""
    target: Annotated[str, tyro.conf.arg(metavar="pixel|clip|hybrid|hog|ema|timm:NAME")] = "pixel"
    """What decoders predict: pixels, features of a teacher, or HOG; `--loss` is an alias."""
    teacher: Annotated[str, shown_as("NAME|FILE|RUN")] = ""
    """clip: open_clip model, local-dir:FOLDER or weights; timm:NAME: weights; hybrid: a run."""
    norm_pix: bool = True
    """Normalize the pixels of each target patch (better features; off for better pictures)."""
    img_size: ImageSize = 224
    """Side of a square input image, or height and width, pixels."""
    patch_size: Size = 16
    """Side of a patch, pixels."""
    in_chans: Annotated[int, Field(gt=0, le=16)] = 3
    """Channels of an image."""
    pixel_bits: Literal[8, 16] = 8
    """Bits of a pixel's channel; where pixel_mean is not given, `data stats` tells them."""
    pixel_mean: Annotated[tuple[float, ...], shown_as("FLOAT ...")] = ()
    """Mean of each channel of 1 (default: ImageNet's for RGB, else what `data stats` found)."""
    pixel_std: Annotated[tuple[float, ...], shown_as("FLOAT ...")] = ()
    """Standard deviation of each channel, as the mean."""
    embed_dim: Size = 768
    """Encoder width."""
    depth: Annotated[int, Field(gt=0, le=1024)] = 12
    """Encoder blocks."""
    num_heads: Size = 12
    """Attention heads of an encoder block."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of every MLP divided by its block's width."""
    decoder_embed_dim: Size = 512
    """Decoder width."""
    decoder_depth: Annotated[int, Field(gt=0, le=1024)] = 4
    """Blocks of each decoder."""
    decoder_num_heads: Size = 16
    """Attention heads of a decoder block."""
    mask_ratio: float = 0.75
    """Share of patches removed; int(num_patches * (1 - mask_ratio)) stay visible, as in MAE."""
    num_segments: Annotated[int, Field(gt=0, le=1024)] = 6
    """MIRL: equal runs of blocks; segment g is paired with segment num_segments + 1 - g."""
    taps: Taps = UNSET_TAPS
    """DeepMIM: numbers (from 1) of the blocks that feed a decoder, or `even` / `even:N`."""
    teacher_dim: Size = 512
    """Width of the teacher's features (targets clip and timm:NAME)."""
    hybrid_alphas: Annotated[tuple[float, ...], shown_as("FLOAT ...")] = ()
    """Share of raw pixels in each tap's hybrid target (default: evenly from 0 to 1)."""
    masked_query: bool = True
    """Run the last decoder block for the masked tokens only: exact, fewer FLOPs."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        """Older names: `loss` for the target; shares of pixels alone meant hybrid targets."""
        if isinstance(values, dict):
            values = dict(values)
            if "loss" in values:
                values["target"] = values.pop("loss")
            target = values.get("target", "pixel")
            if values.get("hybrid_alphas") and target == "pixel":
                target = "hybrid"
            values["target"] = ALIASES.get(target, target) if isinstance(target, str) else target
        return values

    @field_validator("img_size", mode="before")
    @classmethod
    def _one_side(cls, value: Any) -> Any:
        sides = tuple(value) if isinstance(value, list | tuple) else (value,)
        return sides[0] if len(set(sides)) == 1 else sides

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        names = ", ".join(METHODS)
        require(value in METHODS, "method", value, f"unknown; choose one of {names}")
        return value

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str) -> str:
        find_objective(value)
        return value

    @field_validator("taps", mode="before")
    @classmethod
    def _spread_taps(cls, value: Any, info: Any) -> Any:
        data = info.data
        if "depth" not in data or "method" not in data or "num_segments" not in data:
            return (1,)  # another key is wrong already and is reported first
        if isinstance(value, str):
            value = _taps_from_words([value])
        try:
            value = tuple(map(operator.index, value))
        except TypeError:
            raise ValueError(f"taps={value}: {_TAPS_RULE}") from None
        return METHODS[data["method"]].taps(data["depth"], data["num_segments"], value)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for side in self.image_format.size:
            require_divisible("img_size", side, "patch_size", self.patch_size)
        require_divisible("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        require_divisible(
            "decoder_embed_dim",
            self.decoder_embed_dim,
            "decoder_num_heads",
            self.decoder_num_heads,
        )
        for key in ("embed_dim", "decoder_embed_dim"):
            require_divisible(key, getattr(self, key), "the position table's 4 parts", 4)
        require(
            min(self.embed_dim, self.decoder_embed_dim) * self.mlp_ratio >= 1,
            "mlp_ratio",
            self.mlp_ratio,
            "leaves an MLP without hidden units; papers use 4",
        )
        self._check_taps()
        self._check_statistics()
        rule = (
            f"leaves {self.num_visible} of {self.num_patches} patches visible; "
            "at least one must be visible and one masked"
        )
        visible = 0 < self.num_visible < self.num_patches
        require(visible, "mask_ratio", self.mask_ratio, rule)
        method, objective = method_of(self), objective_of(self)
        method.check(self)
        if self.hybrid_alphas:
            alphas = ",".join(f"{alpha:g}" for alpha in self.hybrid_alphas)
            in_range = all(0 <= alpha <= 1 for alpha in self.hybrid_alphas)
            require(in_range, "hybrid_alphas", alphas, "must lie in [0, 1]")
            require(self.target == "hybrid", "hybrid_alphas", alphas, "are for target hybrid")
        require(
            objective.sums_pairs or not method.paired,
            "target",
            self.target,
            f"{self.method} is defined for target pixel",
        )
        objective.check_model(self)
        return self

    def _check_taps(self) -> None:
        text = ",".join(map(str, self.taps))
        increasing = all(a < b for a, b in zip(self.taps, self.taps[1:], strict=False))
        require(
            bool(self.taps) and self.taps[0] >= 1 and increasing,
            "taps",
            text,
            "must be increasing block numbers from 1; use --taps even",
        )
        require(
            self.taps[-1] == self.depth,
            "taps",
            text,
            f"must end at block {self.depth} (depth), so that every block is trained; "
            "use --taps even",
        )

    def _check_statistics(self) -> None:
        for key, values in (("pixel_mean", self.pixel_mean), ("pixel_std", self.pixel_std)):
            text = ",".join(f"{value:g}" for value in values)
            wanted = self.in_chans if self.pixel_mean or self.pixel_std else 0
            rule = f"must be {wanted} numbers, one for each of in_chans={self.in_chans}"
            require(len(values) == wanted, key, text, rule)
        rule = "must be positive; leave channels out that are constant"
        text = ",".join(f"{value:g}" for value in self.pixel_std)
        require(all(value > 0 for value in self.pixel_std), "pixel_std", text, rule)

    @property
    def loss(self) -> str:
        """The older name of `target`, with the older name of CLIP's."""
        older = {name: alias for alias, name in ALIASES.items()}
        return older.get(self.target, self.target)

    @property
    def image_format(self) -> ImageFormat:
        """What an image must be."""
        size = self.img_size
        height, width = (size, size) if isinstance(size, int) else size
        return ImageFormat(self.in_chans, height, width, self.pixel_bits)

    @property
    def pixel_statistics(self) -> PixelStatistics:
        """What integer images are normalized with; empty where nobody has told it."""
        if self.image_format.is_rgb and not self.pixel_mean:
            return IMAGENET
        return PixelStatistics(self.pixel_mean, self.pixel_std)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_format.size
        return height // self.patch_size, width // self.patch_size

    @property
    def grid_size(self) -> int:
        """Patches along a side of a square image."""
        rows, columns = self.grid
        assert rows == columns, "asked of a square image only"
        return rows

    @property
    def num_patches(self) -> int:
        """L, patches of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def num_visible(self) -> int:
        """Visible patches of an image; truncates in floating point exactly as MAE does."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def out_dim(self) -> int:
        """Width of a prediction."""
        return objective_of(self).width(self)

    @property
    def mix_alphas(self) -> tuple[float, ...]:
        """Share of raw pixels in each tap's hybrid target."""
        return self.hybrid_alphas or even_alphas(len(self.taps))


def even_alphas(num_taps: int) -> tuple[float, ...]:
    """Shares of raw pixels in hybrid targets, from 0 at the first tap evenly to 1 at the last."""
    return (*(k / (num_taps - 1) for k in range(num_taps - 1)), 1.0)
