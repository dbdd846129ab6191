"""Exact counts over the validation images: each image once, on any number of processes.

Legend: N images, B of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from deepmim_scale.data.source import good_ids
from deepmim_scale.finetune.data import iter_evaluation
from deepmim_scale.parallel import zero
from deepmim_scale.precision import Precision

if TYPE_CHECKING:
    from deepmim_scale.finetune.prepare import PreparedFinetune

NUM_COUNTS = 4  # right, right among the likeliest, summed loss, images


class Counter:
    """Sums over images for several sets of weights, which are told apart by a prefix."""

    def __init__(self, prefixes: Sequence[str], top: int, device: torch.device) -> None:
        self._top, self._prefixes = top, list(prefixes)
        shape = (len(self._prefixes), NUM_COUNTS)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, prefix: str, logits: Tensor, labels: Tensor) -> None:
        """Count logits [B, K] against labels [B]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Of equal logits the first class is the likelier, on every device; NaN is behind nothing.
        own, classes = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1])
        tied_later = (logits == own) & (classes.to(labels) >= labels[:, None])
        ahead = logits.shape[1] - ((logits < own) | tied_later).sum(1)
        place = self._sums[self._prefixes.index(prefix)]
        place[0] += (ahead < 1).sum()
        place[1] += (ahead < self._top).sum()
        place[2] += cross_entropy(logits, labels, reduction="sum").double()
        place[3] += len(labels)

    def reduce(self, expected: int) -> None:
        """Sum over all processes; every image must have been counted once."""
        dist.all_reduce(self._sums)
        counted = round(self._sums[:, -1].mean().item())
        assert counted == expected, f"{counted} images counted of {expected}"

    @property
    def counts(self) -> dict[str, list[float]]:
        """Right, right among the likeliest, summed loss, images; by prefix."""
        return dict(zip(self._prefixes, self._sums.tolist(), strict=True))

    def row(self) -> dict[str, Any]:
        """Accuracies in percent and mean losses, for metrics.jsonl."""
        row: dict[str, Any] = {}
        for prefix, (first, likeliest, loss, images) in self.counts.items():
            row |= {
                f"{prefix}accuracy": 100 * first / images,
                f"{prefix}accuracy_top{self._top}": 100 * likeliest / images,
                f"{prefix}validation_loss": loss / images,
            }
        return row | {"validation_images": int(images)}


@torch.no_grad()
def evaluate(
    prepared: PreparedFinetune,
    model: nn.Module,
    variants: Mapping[str, Mapping[str, Tensor]],
    precision: Precision,
    device: torch.device,
) -> Counter:
    """Counts for every set of weights of `variants`; each image is decoded once.

    Every rank calls it. Raises BadImage for a file that cannot be decoded.
    """
    model.eval()
    sources, config = prepared.sources, prepared.config
    counter = Counter(list(variants), prepared.top, device)
    dtype = next(model.parameters()).dtype
    for images in iter_evaluation(
        sources.val,
        sources.val_labels,
        prepared.transforms[1],
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        batch=config.microbatch_size,
        workers=config.loader_workers,
    ):
        pixels, labels = images.to(device)
        for prefix, weights in variants.items():
            cast = {name: value.to(dtype) for name, value in weights.items()}
            with zero.autocast(precision, device):
                logits = functional_call(model, cast, (pixels.to(dtype),))
            counter.add(prefix, logits, labels)
    counter.reduce(len(good_ids(sources.val)))
    return counter
