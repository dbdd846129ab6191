"""A stage: a run of encoder blocks with the decoders that they feed.

The encoder's state is a tuple `(hidden, *carries)`: hidden [B, K+1, D]; MIRL's carries, one per
finished segment and one for the input, [B, K+1, d]; MAE and DeepMIM have none. A whole model is the
stage that holds every block. Legend: B images, L patches, K visible patches, D and d widths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from deepmim_kernels import gather_patches, use_triton
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepmim_scale.batch import Masking
from deepmim_scale.config import ModelConfig
from deepmim_scale.image_format import show_size
from deepmim_scale.images import normalize, pixel_scale
from deepmim_scale.methods import decoder_names, method_of
from deepmim_scale.models.blocks import LayerNorm, gather_tokens, position_table, transformer_block
from deepmim_scale.models.decoder import Carry, CrossDecoder, Decoder, decoder_table

State = tuple[Tensor, ...]
# (decoder's name, its input tensors) -> the tensors with which the encoder goes on
TapFunction = Callable[[str, State], State]
Recompute = Literal["none", "encoder", "all"]


class Stage(nn.Module):
    """Blocks `first` to `last` (from 1, inclusive), their decoders, and the ends of the encoder.

    `recompute` (activation checkpointing) keeps only the inputs of each encoder block, or also
    those of each decoder, and runs them again in the backward pass: exact, slower, less memory.
    """

    def __init__(
        self, config: ModelConfig, first: int, last: int, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self._has_carries = method_of(config).carries
        is_first, is_last = first == 1, last == config.depth
        if is_first:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
            self.pos_embed = position_table(config.embed_dim, config.grid)
            self.patch_embed = PatchEmbed(
                config.img_size, config.patch_size, config.in_chans, config.embed_dim
            )
        # timm's names with the global block index, whatever stage a block is on.
        self.blocks = nn.ModuleDict(
            {
                str(number - 1): transformer_block(
                    config.embed_dim, config.num_heads, config.mlp_ratio
                )
                for number in range(first, last + 1)
            }
        )
        self.norm = LayerNorm(config.embed_dim) if is_last else nn.Identity()
        names = {n: name for n, name in decoder_names(config).items() if first <= n <= last}
        self.decoder_names = names
        if self._has_carries:
            self.carries = nn.ModuleDict(
                {name: Carry(config, own_norm=n != config.depth) for n, name in names.items()}
            )
            if is_first:
                self.carries["low"] = Carry(config, own_norm=True)
            self.decoders = nn.ModuleDict(
                {name: CrossDecoder(config, decoder_table(config)) for name in names.values()}
            )
        else:
            table = decoder_table(config)  # one frozen table for all decoders
            self.decoders = nn.ModuleDict({name: Decoder(config, table) for name in names.values()})

    def embed(self, images: Tensor, masking: Masking) -> State:
        """State before block 1: visible patches of images [B, C, H, W] with position and CLS.

        images: integers, or floating and normalized. ValueError for images of another size.
        """
        height, width = images.shape[-2:]
        # Here for both paths: a gather of patches would take any size, with the wrong positions.
        if (height, width) != self.config.image_format.size:
            wanted = show_size(self.config.img_size)
            raise ValueError(f"images are {height}x{width}: must be img_size={wanted}; resize them")
        statistics = self.config.pixel_statistics
        dtype, ids = self.cls_token.dtype, masking.ids_visible  # 16-bit weights, 16-bit images
        if use_triton("auto", images):
            # The visible patches alone go through the convolution, as the Linear that it is.
            size, project = self.config.patch_size, self.patch_embed.proj
            pixels = gather_patches(images, ids, patch_size=size, **pixel_scale(images, statistics))
            x = F.linear(pixels.to(dtype), project.weight.flatten(1), project.bias)
            x = x + self.pos_embed[0, 1:][ids]
        else:
            x = self.patch_embed(normalize(images, statistics).to(dtype)) + self.pos_embed[:, 1:]
            x = gather_tokens(x, ids)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        hidden = torch.cat([cls, x], dim=1)
        if self._has_carries:
            return hidden, self.carries["low"](hidden)
        return (hidden,)

    def encode(self, state: State, tap: TapFunction) -> State:
        """Run this stage's blocks; `tap` is called with each decoder's name and input."""
        hidden, *carries = state
        for index, block in self.blocks.items():
            hidden = self._run(block, hidden, again=self.recompute != "none")
            number = int(index) + 1
            name = self.decoder_names.get(number)
            if number == self.config.depth:
                hidden = self.norm(hidden)
            if name is None:
                continue
            if self._has_carries:
                carries = list(tap(name, (*carries, self.carries[name](hidden))))
            else:
                (hidden,) = tap(name, (hidden,))
        return hidden, *carries

    def decode(self, name: str, tensors: State, masking: Masking) -> Tensor:
        """Predictions [B, L-K, P] of the masked patches by decoder `name` from its input."""
        decode = partial(self.decoders[name], masking=masking)
        return self._run(decode, *tensors, again=self.recompute == "all")

    def _run(self, function: Callable[..., Tensor], *tensors: Tensor, again: bool) -> Tensor:
        if again and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False)
        return function(*tensors)
