"""MAE (He et al., CVPR 2022): one decoder, after the last block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.methods.base import (
    Combination,
    any_cut,
    block_names,
    decoder_prefixes,
    follow_depth,
    hidden_state,
    own_losses,
)

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig


class Mae:
    """Masked autoencoder."""

    name = "mae"
    source = "facebookresearch/mae"
    paired = carries = local_gradients = free_taps = False
    combinations: tuple[Combination, ...] = (Combination("linear", any_cut),)

    decoder_names = staticmethod(block_names)
    losses = staticmethod(own_losses)
    boundary = staticmethod(hidden_state)

    def taps(self, depth: int, num_segments: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The last block."""
        return follow_depth(wanted, (depth,), "mae has one decoder, after the last block")

    def check(self, model: ModelConfig) -> None:
        """Nothing beyond what holds for every model."""

    def official_prefixes(self, model: ModelConfig) -> dict[str, str]:
        """Names of facebookresearch/mae, models_mae.py."""
        (name,) = self.decoder_names(model)
        ends = {
            f"decoders.{name}.embed": "decoder_embed",
            f"decoders.{name}.pos_embed": "decoder_pos_embed",
        }
        return ends | decoder_prefixes([name], [""])
