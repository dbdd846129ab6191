"""Transformer parts that encoder and decoders share, built on timm's Block.

Legend: B images, N tokens, M queried tokens, D width.
Source: facebookresearch/mae models_mae.py and util/pos_embed.py; CrossBlock: russellllaputa/MIRL.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from deepmim_scale.models.weight_queue import linear

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def transformer_block(
    dim: int, num_heads: int, mlp_ratio: float, kind: type[Block] = Block
) -> Block:
    """timm's pre-norm block as MAE uses it: biased qkv, exact GELU, no dropout, no layer scale."""
    norm: Any = LayerNorm
    return kind(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm)


def position_table(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """MAE's frozen sin-cos table [1, L+1, dim]: row 0 (CLS) zeros, then columns | rows."""
    rows, columns = grid
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    column = np.tile(np.arange(columns), rows)[:, None] * omega
    row = np.repeat(np.arange(rows), columns)[:, None] * omega
    table = np.hstack([np.sin(column), np.cos(column), np.sin(row), np.cos(row)])
    table = np.vstack([np.zeros(dim), table]).astype(np.float32)
    return nn.Parameter(torch.from_numpy(table).unsqueeze(0), requires_grad=False)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens [B, M, D] of x [B, N, D] at ids [B, M]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def queried_attention(attn: Any, x: Tensor, queries: Tensor) -> Tensor:
    """timm's self-attention for `queries` [B, M, D] only, with keys and values from x [B, N, D]."""
    dim = x.shape[-1]
    q = linear(attn.qkv, queries, slice(0, dim))
    k, v = linear(attn.qkv, x, slice(dim, 3 * dim)).chunk(2, dim=-1)
    q, k, v = (_heads(t, attn.num_heads) for t in (q, k, v))
    return attn.proj(_attend(q, k, v))


class DecoderBlock(Block):
    """timm's block that can answer for some tokens only."""

    def forward(  # type: ignore[override]
        self, x: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D], or [B, M, D] at the tokens ids [B, M]: exact there."""
        if ids is None:
            return super().forward(x)
        normed = self.norm1(x)
        queries = gather_tokens(normed, ids)
        x = gather_tokens(x, ids) + queried_attention(self.attn, normed, queries)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Attention of queries [B, M, D] to keys and values [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [B, M, D] and memory [B, N, D] -> [B, M, D]."""
        k, v = self.kv(memory).chunk(2, dim=-1)
        q, k, v = (_heads(t, self.num_heads) for t in (self.q(x), k, v))
        return self.proj(_attend(q, k, v))


class CrossBlock(nn.Module):
    """MIRL's decoder block: self-attention, cross-attention to earlier segments, MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        own = transformer_block(dim, num_heads, mlp_ratio)
        self.norm1, self.attn = own.norm1, own.attn
        self.norm2, self.norm3 = LayerNorm(dim), LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm4 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor, ids: Tensor | None = None) -> Tensor:
        """x [B, N, D] -> [B, N, D], or [B, M, D] at the tokens ids [B, M]."""
        normed = self.norm1(x)
        if ids is None:
            x = x + self.attn(normed)
        else:
            queries = gather_tokens(normed, ids)
            x = gather_tokens(x, ids) + queried_attention(self.attn, normed, queries)
        x = x + self.cross_attn(self.norm2(x), self.norm3(memory))
        return x + self.mlp(self.norm4(x))


def compile_blocks(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every encoder and decoder block by itself; equal shapes share one graph."""
    for block in module.modules():
        if isinstance(block, Block | CrossBlock):
            block.compile(fullgraph=True, backend=backend)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """MAE's initialization, each parameter from its own stream (seed, name).

    A name holds the global block number, so weights do not depend on how a model is cut in stages.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.is_meta:
            continue
        # torch's generator reads 32 bits of its seed, so both must be mixed into these.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        if name.endswith(("cls_token", "mask_token")):
            parameter.normal_(std=0.02, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)  # gains of LayerNorm
        else:
            # The patch convolution is treated as the Linear it is: [D, C * p * p].
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
