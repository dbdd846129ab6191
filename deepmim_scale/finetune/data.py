"""Labelled images for training and evaluation, through torch's DataLoader.

Order and replacements follow from the sample plan, augmentation from (seed, epoch, sample).
Legend: B micro-batch, M micro-batches per step, S side of the input.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepmim_scale.data.backend import BadImage
from deepmim_scale.data.classes import Classes, open_classes
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import OnBad, Source, good_ids, printable
from deepmim_scale.data.step_loader import Share, Span
from deepmim_scale.data.torch_backend import image_reader
from deepmim_scale.errors import UserError
from deepmim_scale.finetune.draws import seed_sample
from deepmim_scale.finetune.transform import Transform
from deepmim_scale.runs.stop import ignore_signals


class Images(NamedTuple):
    """One micro-batch."""

    pixels: Tensor
    """float32 [B, 3, S, S], normalized."""
    labels: Tensor
    """int64 [B]."""

    def to(self, device: torch.device) -> Images:
        """The same on `device`."""
        return Images(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class LabelledSources:
    """Both parts of a folder of classes, with a label for every sample id."""

    train: Source
    val: Source
    names: tuple[str, ...]
    """The classes, in the order of the head's rows."""
    train_labels: np.ndarray
    """int64, one for each sample id of train."""
    val_labels: np.ndarray
    """int64, one for each sample id of val."""


def open_labelled(data: str, cache: str, on_bad: OnBad) -> LabelledSources:
    """UserError for one class only, or a class of val that train lacks."""
    if not data:
        raise UserError("data: missing; give a folder with train/<class> and val/<class>")
    classes = open_classes(data, cache, on_bad)
    parts = [
        _by_id(source, labels)
        for source, labels in ((classes.train, classes.labels), (classes.val, classes.expected))
    ]
    return LabelledSources(classes.train, classes.val, _names(classes), *parts)


def _names(classes: Classes) -> tuple[str, ...]:
    source = classes.train
    return tuple(sorted({source.classes[i] for i in source.labels[good_ids(source)]}))


def _by_id(source: Source, labels: np.ndarray) -> np.ndarray:
    """Labels of the good samples, at their ids; -1 for bad ones, which nothing reads."""
    whole = np.full(len(source), -1, np.int64)
    whole[good_ids(source)] = labels
    return whole


# Where a training sample stands: step and id. What the loader makes of it: pixels and label.
Place = tuple[int, int]
Item = tuple[Tensor, int] | BadImage


class TrainingImages(Dataset[Item]):
    """Augmented samples by (step, id); a bad one is replaced by the next of the epoch's order.

    `ids` restricts them to some samples of the source, which the plan counts from 0.
    """

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        plan: SamplePlan,
        transform: Transform,
        on_bad: OnBad,
        ids: np.ndarray | None = None,
    ) -> None:
        self._source, self._labels, self._plan = source, labels, plan
        self._transform, self._on_bad = transform, on_bad
        # The samples that the plan's numbers stand for.
        self._ids = np.arange(len(source)) if ids is None else ids
        self._read = image_reader(source)
        self._bad = dict(source.bad)

    def __getitem__(self, place: Place) -> Item:
        step, wanted = place
        sample, attempt = int(self._ids[wanted]), 0
        while True:
            if sample not in self._bad:
                try:
                    pixels = self._read(sample)
                    break
                except BadImage as error:
                    if self._on_bad == "fail":
                        return error
                    self._bad[sample] = str(error)
                    name = printable(self._source.name(sample))
                    print(f"step {step}: {name}: the next sample replaces it", file=sys.stderr)
            attempt += 1
            if attempt == len(self._ids):
                return BadImage(f"{self._source.location}: no image can be decoded")
            sample = int(self._ids[self._plan.replacement(step, wanted, attempt)])
        epoch, _ = self._plan.locate(step)
        seed_sample(self._plan.seed, epoch, sample)
        return self._transform(Image.fromarray(pixels)), int(self._labels[sample])


class ValidationImages(Dataset[Item]):
    """Samples by id, resized and cut."""

    def __init__(self, source: Source, labels: np.ndarray, transform: Transform) -> None:
        self._labels, self._transform = labels, transform
        self._read = image_reader(source)

    def __getitem__(self, sample: int) -> Item:
        try:
            pixels = self._read(sample)
        except BadImage as error:
            return error
        return self._transform(Image.fromarray(pixels)), int(self._labels[sample])


def collate(items: Sequence[Item]) -> Images | BadImage:
    """A micro-batch, or the first image of it that cannot be decoded."""
    # A worker's exception would arrive with its traceback in its message.
    bad = next((item for item in items if isinstance(item, BadImage)), None)
    if bad is not None:
        return bad
    good = [item for item in items if not isinstance(item, BadImage)]
    return Images(torch.stack([p for p, _ in good]), torch.tensor([label for _, label in good]))


def _load(
    dataset: Dataset[Item], batches: Sequence[Sequence[Any]], workers: int
) -> Iterator[Images]:
    """Micro-batches in their order; raises BadImage at the one that holds a bad file."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # not the stream that drop path draws from
        worker_init_fn=ignore_signals,
    )
    for images in loader:
        if isinstance(images, BadImage):
            raise images
        yield Images(*images)


class _MicroBatches(Sequence[list[Place]]):
    """The places of each micro-batch of a replica, made when they are asked for."""

    def __init__(self, plan: SamplePlan, share: Share, span: Span) -> None:
        self._plan, self._share, self._span = plan, share, span

    def __len__(self) -> int:
        return self._span.num_steps * self._share.num_microbatches

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        step, microbatch = divmod(number, self._share.num_microbatches)
        step += self._span.start_step
        share = self._share
        ids = self._plan.micro_batch(
            step, microbatch, share.dp_rank, share.num_microbatches, share.num_replicas
        )
        return [(step, sample) for sample in ids.tolist()]


def iter_steps(
    images: TrainingImages, plan: SamplePlan, share: Share, span: Span, workers: int
) -> Iterator[list[Images]]:
    """M micro-batches for each step of a replica."""
    stream = _load(images, _MicroBatches(plan, share, span), workers)
    for _ in range(span.num_steps):
        yield [next(stream) for _ in range(share.num_microbatches)]


def iter_evaluation(
    source: Source,
    labels: np.ndarray,
    transform: Transform,
    *,
    rank: int,
    num_ranks: int,
    batch: int,
    workers: int,
    ids: np.ndarray | None = None,
) -> Iterator[Images]:
    """Samples rank, rank + num_ranks, ... of the good ones or of `ids`, each once.

    Raises BadImage.
    """
    mine = (good_ids(source) if ids is None else ids)[rank::num_ranks].tolist()
    batches = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    return _load(ValidationImages(source, labels, transform), batches, workers)
