"""DeepMIM (Ren et al., WACV 2025): a decoder and a loss after each of several blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.methods.base import (
    Combination,
    Loss,
    TensorSpec,
    any_cut,
    block_names,
    decoder_prefixes,
    even_taps,
    require,
    residual_stream,
)

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig


class DeepMim:
    """Deep supervision: every decoder is MAE's, their losses are summed."""

    name = "deepmim"
    source = "OliverRensu/DeepMIM"
    paired = carries = False
    local_gradients = free_taps = True
    combinations: tuple[Combination, ...] = (Combination("linear", any_cut),)

    def taps(self, depth: int, num_segments: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """What the user wants; -N spreads N taps evenly."""
        if len(wanted) != 1 or wanted[0] >= 0:
            return wanted
        num_taps = -wanted[0]
        rule = f"more decoders than blocks; use at most even:{depth} (depth)"
        require(num_taps <= depth, "taps", f"even:{num_taps}", rule)
        return even_taps(depth, num_taps)

    def check(self, model: ModelConfig) -> None:
        """Nothing beyond what holds for every model."""

    def decoder_names(self, model: ModelConfig) -> tuple[str, ...]:
        """The blocks' numbers."""
        return block_names(model)

    def losses(self, model: ModelConfig) -> tuple[Loss, ...]:
        """One for each decoder; the total is their sum (OliverRensu/DeepMIM, forward_loss)."""
        return tuple(Loss(name, (name,), 1.0) for name in self.decoder_names(model))

    def boundary(self, model: ModelConfig, block: int) -> tuple[TensorSpec, ...]:
        """The hidden state."""
        return (residual_stream(model),)

    def official_prefixes(self, model: ModelConfig) -> dict[str, str]:
        """Names of OliverRensu/DeepMIM, models_mae.py: decoders count from 1, share one table."""
        names = self.decoder_names(model)
        numbers = [str(index) for index in range(1, len(names) + 1)]
        prefixes = decoder_prefixes(names, numbers)
        for name, number in zip(names, numbers, strict=True):
            prefixes[f"decoders.{name}.embed"] = f"decoder_embed{number}"
            prefixes[f"decoders.{name}.pos_embed"] = "decoder_pos_embed"
        return prefixes
