"""DeepMIM (Ren et al., WACV 2025): a decoder and a loss after each of several blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.methods.base import (
    Combination,
    any_cut,
    block_names,
    decoder_prefixes,
    even_taps,
    hidden_state,
    own_losses,
    require,
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

    decoder_names = staticmethod(block_names)
    losses = staticmethod(own_losses)
    boundary = staticmethod(hidden_state)

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

    def official_prefixes(self, model: ModelConfig) -> dict[str, str]:
        """Names of OliverRensu/DeepMIM, models_mae.py: decoders count from 1, share one table."""
        names = self.decoder_names(model)
        numbers = [str(index) for index in range(1, len(names) + 1)]
        prefixes = decoder_prefixes(names, numbers)
        for name, number in zip(names, numbers, strict=True):
            prefixes[f"decoders.{name}.embed"] = f"decoder_embed{number}"
            prefixes[f"decoders.{name}.pos_embed"] = "decoder_pos_embed"
        return prefixes
