"""How far each head looks, and how alike the heads of a block are, on unmasked images.

Legend: N images, H heads, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepmim_scale.models import Model


@dataclass(frozen=True)
class BlockAttention:
    """One encoder block, averaged over images."""

    block: int
    """Number, from 1."""
    distances: list[float]
    """Mean attention distance of each head, in patches."""
    head_cosine: float
    """Mean cosine between two heads' maps: 1 if all heads look alike, lower if diverse."""


@torch.no_grad()
def attention_maps(model: Model, images: Tensor) -> Iterator[Tensor]:
    """Attention [N, H, L+1, L+1] of each block, rows of queries, class token first."""
    hidden = model.embed_whole(images)
    blocks: Iterable[Any] = model.blocks.values()
    for block in blocks:
        attn = block.attn
        q, k, _ = attn.qkv(block.norm1(hidden)).chunk(3, dim=-1)
        q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k))
        yield (q * attn.scale @ k.transpose(2, 3)).softmax(-1)
        hidden = block(hidden)


def between_patches(maps: Tensor) -> Tensor:
    """Maps [N, H, L+1, L+1] without the class token, rows summing to 1 again: [N, H, L, L]."""
    patches = maps[..., 1:, 1:]
    return patches / patches.sum(-1, keepdim=True)


def patch_distances(rows: int, columns: int) -> Tensor:
    """Distances [L, L] between the centers of the patches of a grid, in patches."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cdist(places, places)


def mean_distances(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean attention distance [N, H] of maps between patches [N, H, L, L] of a grid, in patches.

    The distance from a query to the patches it attends to, weighted by attention, averaged over all
    queries (Dosovitskiy et al. 2021, there in pixels).
    """
    distances = patch_distances(*grid).to(maps)
    return (maps * distances).sum(-1).mean(-1)


def head_cosines(maps: Tensor) -> Tensor:
    """Mean pairwise cosine [N] of an image's heads, of maps between patches [N, H, L, L].

    A head's map is one vector of L * L numbers; the mean is over the H (H - 1) / 2 pairs of
    different heads (0 where there is one head).
    """
    flat = torch.nn.functional.normalize(maps.flatten(2), dim=-1)
    cosines = flat @ flat.transpose(1, 2)
    num_heads = maps.shape[1]
    return (cosines.sum((1, 2)) - num_heads) / max(num_heads * (num_heads - 1), 1)


def measure(model: Model, batches: Iterable[Tensor]) -> list[BlockAttention]:
    """Every block of a model on batches [N, C, H, W], uint8 or normalized."""
    distances: list[list[Tensor]] = [[] for _ in model.blocks]
    cosines: list[list[Tensor]] = [[] for _ in model.blocks]
    for images in batches:
        for number, maps in enumerate(attention_maps(model, images)):
            patches = between_patches(maps)
            distances[number].append(mean_distances(patches, model.config.grid))
            cosines[number].append(head_cosines(patches))
    return [
        BlockAttention(number, torch.cat(far).mean(0).tolist(), torch.cat(alike).mean().item())
        for number, (far, alike) in enumerate(zip(distances, cosines, strict=True), start=1)
    ]


def draw(blocks: list[BlockAttention], uniform: float, path: Path) -> None:
    """A PNG: distance over depth, a dot for each head; beside it how alike the heads are.

    `uniform` is the distance of attention that looks everywhere alike.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = [block.block for block in blocks]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(2, 1))
    for block in blocks:
        count = len(block.distances)
        left.plot([block.block] * count, block.distances, "o", color="C0", alpha=0.5, markersize=4)
    means = [sum(block.distances) / len(block.distances) for block in blocks]
    left.plot(numbers, means, color="C0", label="mean of heads")
    left.axhline(uniform, color="gray", linestyle="--", linewidth=1, label="uniform attention")
    left.set(xlabel="block", ylabel="mean attention distance, patches", ylim=(0, None))
    left.legend(loc="lower left")
    right.plot(numbers, [block.head_cosine for block in blocks], "o-", color="C1", markersize=4)
    right.set(xlabel="block", ylabel="mean cosine between heads", ylim=(0, 1.02))
    for axes in (left, right):
        axes.locator_params(axis="x", integer=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
