"""Decoders: from visible tokens to predictions for every masked patch.

Legend: B images, L patches, K visible, D encoder width, d decoder width, P prediction width.
Sources: facebookresearch/mae, OliverRensu/DeepMIM, russellllaputa/MIRL (their model files).
"""

from __future__ import annotations

import torch
from deepmim_kernels import decoder_assemble
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from deepmim_scale.batch import Masking
from deepmim_scale.config import ModelConfig
from deepmim_scale.models.blocks import (
    CrossBlock,
    DecoderBlock,
    LayerNorm,
    gather_tokens,
    position_table,
    transformer_block,
)


def _chosen(x: Tensor, masking: Masking, queried: bool, full: bool) -> Tensor:
    """Predictions of masked patches from what the last block was asked for; all with `full`."""
    if queried:
        return x
    return x[:, 1:] if full else gather_tokens(x[:, 1:], masking.ids_masked)


class Decoder(nn.Module):
    """MAE's decoder; DeepMIM hangs one on every tap."""

    def __init__(self, config: ModelConfig, pos_embed: nn.Parameter) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.masked_query = config.masked_query
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = pos_embed
        self.blocks = nn.ModuleList(
            transformer_block(dim, config.decoder_num_heads, config.mlp_ratio, DecoderBlock)
            for _ in range(config.decoder_depth)
        )
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, config.out_dim)

    def forward(self, feature: Tensor, *, masking: Masking, full: bool = False) -> Tensor:
        """Feature [B, K+1, D] -> predictions [B, L-K, P] of the masked patches.

        `full` gives [B, L, P], the predictions of all patches in image order.
        """
        tokens = self.embed(feature)
        x = decoder_assemble(tokens, self.mask_token, self.pos_embed, masking.ids_restore)
        for block in self.blocks[:-1]:
            x = block(x)
        queried = self.masked_query and not full
        x = self.blocks[-1](x, masking.ids_masked + 1 if queried else None)
        return _chosen(self.pred(self.norm(x)), masking, queried, full)


class CrossDecoder(nn.Module):
    """MIRL's decoder: reads its own segment and cross-attends to all earlier ones."""

    def __init__(self, config: ModelConfig, pos_embed: nn.Parameter) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.masked_query = config.masked_query
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = pos_embed
        self.blocks = nn.ModuleList(
            CrossBlock(dim, config.decoder_num_heads, config.mlp_ratio)
            for _ in range(config.decoder_depth)
        )
        self.norm = LayerNorm(dim)
        # Unit norm per *input* feature, gain frozen at 1: Paddle's weight_norm on [in, out].
        self.pred = weight_norm(nn.Linear(dim, config.out_dim), dim=1)
        gain = self.pred.parametrizations.weight.original0
        gain.requires_grad_(False)
        gain.data.fill_(1.0)

    def forward(self, *carries: Tensor, masking: Masking, full: bool = False) -> Tensor:
        """Carries e_0 .. e_g, each [B, K+1, d] -> [B, L-K, P], or [B, L, P] with `full`."""
        x = decoder_assemble(carries[-1], self.mask_token, self.pos_embed, masking.ids_restore)
        memory = torch.cat(carries[-2::-1], dim=1)
        queried = self.masked_query and not full
        for block in self.blocks[:-1]:
            x = block(x, memory)
        x = self.blocks[-1](x, memory, masking.ids_masked + 1 if queried else None)
        return _chosen(self.pred(self.norm(x)), masking, queried, full)


class Carry(nn.Module):
    """MIRL: a segment's output as every later decoder sees it, [B, K+1, D] -> [B, K+1, d]."""

    def __init__(self, config: ModelConfig, *, own_norm: bool) -> None:
        super().__init__()
        # The last segment is normalized by the encoder's final norm and has none of its own.
        self.norm = LayerNorm(config.embed_dim) if own_norm else nn.Identity()
        self.embed = nn.Linear(config.embed_dim, config.decoder_embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden state [B, K+1, D] -> [B, K+1, d]."""
        return self.embed(self.norm(hidden))


def decoder_table(config: ModelConfig) -> nn.Parameter:
    """The frozen position table [1, L+1, d] of a decoder."""
    return position_table(config.decoder_embed_dim, config.grid)
