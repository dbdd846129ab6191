"""The micro-batches that one stage decodes, in order, with a way on when a file is bad.

Legend: B micro-batch, C channels, H x W the input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from deepmim_scale.data.backend import Backend, BadImage, DecodeRequest
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips
from deepmim_scale.data.source import OnBad, ReadsAhead, Source, printable


class DecodeJob(NamedTuple):
    """One micro-batch as the sample plan has it, good and bad samples alike."""

    step: int
    ids: np.ndarray
    """int64 [B]."""


class DecodeStream:
    """Call it for the next job's (ids int64 [B], images [B, C, H, W]).

    A sample that the source knows to be bad is replaced by the next good one of the epoch's order.
    That depends on the files alone, so it is the same on every stage and after a restart. One that
    is found to be bad now raises BadImage naming it (on_bad `fail`), or is replaced in the same way
    and reported once on stderr (`replace`).
    """

    def __init__(
        self,
        jobs: Callable[[int], DecodeJob],
        num_jobs: int,
        backend: Backend,
        source: Source,
        plan: SamplePlan,
        min_crop: float,
        on_bad: OnBad,
    ) -> None:
        self.bad = dict(source.bad)
        """Bad samples known so far: id -> reason."""
        self._jobs, self._num_jobs, self._backend = jobs, num_jobs, backend
        self._source, self._plan, self._min_crop = source, plan, min_crop
        self._on_bad = on_bad
        self._next = 0
        self._stream = backend(self._requests_from(0))

    def __call__(self) -> tuple[np.ndarray, torch.Tensor]:
        """The next job's ids int64 [B] and images [B, C, H, W]."""
        try:
            request, images = next(self._stream)
            ids = request.ids
        except BadImage as error:
            ids, images = self._one_by_one(*self._jobs(self._next), error)
            # A backend is finished once it fails, and what it read ahead knew less.
            self._stream = self._backend(self._requests_from(self._next + 1))
        self._next += 1
        return ids, images

    def _requests_from(self, first: int) -> Iterator[DecodeRequest]:
        for number in range(first, self._num_jobs):
            step, ids = self._jobs(number)
            if self.bad:
                ids = np.array([self._good(step, int(i)) for i in ids])
            if isinstance(self._source, ReadsAhead):
                self._source.read_ahead(ids)
            yield self._request(step, ids)

    def _request(self, step: int, ids: np.ndarray) -> DecodeRequest:
        epoch, _ = self._plan.locate(step)
        heights, widths = self._source.sizes[ids].T
        boxes = crops(self._plan.seed, epoch, ids, heights, widths, self._min_crop)
        return DecodeRequest(ids, boxes, flips(self._plan.seed, epoch, ids))

    def _good(self, step: int, sample_id: int) -> int:
        """The sample itself, or the first after it that is not known to be bad."""
        attempt, candidate = 0, sample_id
        while candidate in self.bad:
            attempt += 1
            if attempt == len(self._source):
                raise BadImage(f"{self._source.location}: no image can be decoded")
            candidate = self._plan.replacement(step, sample_id, attempt)
        return candidate

    def _one_by_one(
        self, step: int, ids: np.ndarray, error: BadImage
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Find the bad files of a micro-batch that failed as a whole."""
        found: list[int] = []
        images: list[torch.Tensor] = []
        known = len(self.bad)
        for sample_id in ids.tolist():
            while True:
                good = self._good(step, sample_id)
                try:
                    _, image = next(self._backend(iter([self._request(step, np.array([good]))])))
                except BadImage as reason:
                    self._report(step, good, reason)
                else:
                    break
            found.append(good)
            images.append(image)
        if len(self.bad) == known:
            raise error  # every file decodes alone: the fault is not in the files
        return np.array(found), torch.cat(images)

    def _report(self, step: int, sample_id: int, reason: BadImage) -> None:
        name = self._source.name(sample_id)
        text = str(reason).removeprefix(f"{name}: ")
        if self._on_bad == "fail":
            raise BadImage(
                f"step {step}: {printable(name)}: {text}; run `deepmim-scale data verify "
                f"{self._source.location}` or use --on-bad replace"
            ) from reason
        self.bad[sample_id] = text
        print(
            f"step {step}: {printable(name)}: {text}; the next sample replaces it", file=sys.stderr
        )
