"""MIRL (Huang et al., NeurIPS 2023): segments in pairs, decoders that read all earlier segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepmim_scale.methods.base import (
    Combination,
    Loss,
    TensorSpec,
    decoder_prefixes,
    even_taps,
    follow_depth,
    require_divisible,
    residual_stream,
)

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig


def _folded(model: ModelConfig) -> Sequence[int]:
    # A segment on each stage and both stages of a pair on one rank; one rank holds everything.
    return sorted({1, model.num_segments // 2})


def _whole_segments(model: ModelConfig) -> Sequence[int]:
    segments = model.num_segments
    return [count for count in range(1, segments + 1) if segments % count == 0]


class Mirl:
    """Masked image residual learning: a shallow segment predicts what its deep partner leaves."""

    name = "mirl"
    source = "russellllaputa/MIRL"
    paired = carries = True
    local_gradients = free_taps = False
    combinations: tuple[Combination, ...] = (
        Combination("v", _folded),
        Combination("linear", _whole_segments),
    )

    def taps(self, depth: int, num_segments: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The last block of each segment."""
        return follow_depth(wanted, even_taps(depth, num_segments), "mirl taps end its segments")

    def check(self, model: ModelConfig) -> None:
        """Equal segments, in pairs."""
        require_divisible("depth", model.depth, "num_segments", model.num_segments)
        require_divisible("num_segments", model.num_segments, "segments of a pair", 2)

    def decoder_names(self, model: ModelConfig) -> tuple[str, ...]:
        """The segments' numbers, from 1."""
        return tuple(f"segment{g}" for g in range(1, model.num_segments + 1))

    def losses(self, model: ModelConfig) -> tuple[Loss, ...]:
        """One for each pair, from the outermost inwards; the total is their mean."""
        names, last = self.decoder_names(model), model.num_segments
        half = last // 2
        return tuple(
            Loss(f"pair{g}_{last + 1 - g}", (names[g - 1], names[-g]), 1.0 / half)
            for g in range(1, half + 1)
        )

    def boundary(self, model: ModelConfig, block: int) -> tuple[TensorSpec, ...]:
        """The hidden state, and a carry [K+1, d] of the input and of each finished segment."""
        finished = block * model.num_segments // model.depth
        carry = TensorSpec((model.num_visible + 1, model.decoder_embed_dim), "product")
        return (residual_stream(model), *[carry] * (finished + 1))

    def official_prefixes(self, model: ModelConfig) -> dict[str, str]:
        """Names of russellllaputa/MIRL, models_mirl.py: decoders count from 0, own tables."""
        names = self.decoder_names(model)
        numbers = [str(index) for index in range(len(names))]
        prefixes = decoder_prefixes(names, numbers)
        for name, number in zip(names, numbers, strict=True):
            prefixes[f"decoders.{name}.pos_embed"] = f"decoder_pos_embed{number}"
            prefixes[f"carries.{name}.embed"] = f"decoder_embed{number}"
            if name != names[-1]:  # the last segment has the encoder's final norm
                prefixes[f"carries.{name}.norm"] = f"norm{number}"
        return prefixes | {"carries.low.norm": "norm_low", "carries.low.embed": "decoder_embed0_1"}
