"""Heads that are trained on frozen tokens, and their optimizers.

Legend: N images, L patches, D width, K classes.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEAD_WIDTH = 64


class LinearHead(nn.Module):
    """MAE's linear probe: batch norm without parameters, then a linear layer."""

    def __init__(self, width: int, num_classes: int, pool: str = "class") -> None:
        super().__init__()
        self._pool = pool
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)
        trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, 1 + L, D] -> logits [N, K], of the class token or of the patches' mean."""
        features = tokens[:, 0] if self._pool == "class" else tokens[:, 1:].mean(1)
        return self.linear(self.norm(features))


class AttentiveHead(nn.Module):
    """CAPI's attentive probe: one learned query attends to the patch tokens, then a linear layer.

    Keys and values are projected, the query and the result are not; heads are 64 wide (one head
    where 64 does not divide the width). Source: Darcet et al. 2025, arXiv 2502.08769, and its code.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self._heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.keys_values = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, num_classes)
        for matrix in (self.query, self.keys_values.weight, self.linear.weight):
            trunc_normal_(matrix, std=0.02)
        for bias in (self.keys_values.bias, self.linear.bias):
            nn.init.zeros_(bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, 1 + L, D] -> logits [N, K]; the class token is not looked at."""
        patches = tokens[:, 1:]
        parts = (self.query.expand(len(tokens), -1, -1), *self.keys_values(patches).chunk(2, -1))
        query, keys, values = (x.unflatten(2, (self._heads, -1)).transpose(1, 2) for x in parts)
        return self.linear(scaled_dot_product_attention(query, keys, values).flatten(1))
