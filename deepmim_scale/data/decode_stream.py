"""The micro-batches that one stage decodes, in order, with a way on when a file is bad.

Legend: B micro-batch, S side of the input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from deepmim_scale.data.backend import Backend, BadImage, DecodeRequest
from deepmim_scale.data.manifest import Manifest, printable
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips

Job = tuple[int, np.ndarray]  # step and sample ids int64 [B]


class DecodeStream:
    """Call it for the next job's (ids int64 [B], images uint8 [B, 3, S, S]).

    With on_bad `fail` a bad file raises BadImage naming it; with `replace` the next good sample of
    the epoch's order takes its place, which depends on the files alone and so is the same on every
    stage and after a restart; each bad file is reported once on stderr.
    """

    def __init__(
        self,
        jobs: Callable[[int], Job],
        num_jobs: int,
        backend: Backend,
        manifest: Manifest,
        plan: SamplePlan,
        min_crop: float,
        on_bad: Literal["fail", "replace"],
    ) -> None:
        self.bad: dict[int, str] = {}
        """Bad samples found: id -> reason."""
        self._jobs, self._num_jobs, self._backend = jobs, num_jobs, backend
        self._manifest, self._plan, self._min_crop = manifest, plan, min_crop
        self._paths, self._on_bad = manifest.paths, on_bad
        self._next = 0
        self._stream = backend(self._rows_from(0))

    def __call__(self) -> tuple[np.ndarray, torch.Tensor]:
        try:
            rows, images = next(self._stream)
            ids = rows.ids
        except BadImage as error:
            ids, images = self._one_by_one(*self._jobs(self._next), error)
            self._stream = self._backend(self._rows_from(self._next + 1))
        self._next += 1
        return ids, images

    def _rows_from(self, first: int) -> Iterator[DecodeRequest]:
        for number in range(first, self._num_jobs):
            step, ids = self._jobs(number)
            if self.bad:
                ids = np.array([self._good(step, int(i)) for i in ids])
            yield self._rows(step, ids)

    def _rows(self, step: int, ids: np.ndarray) -> DecodeRequest:
        epoch, _ = self._plan.locate(step)
        sizes = self._manifest.heights[ids], self._manifest.widths[ids]
        boxes = crops(self._plan.seed, epoch, ids, *sizes, self._min_crop)
        return DecodeRequest(
            ids, [self._paths[i] for i in ids], boxes, flips(self._plan.seed, epoch, ids)
        )

    def _good(self, step: int, sample_id: int) -> int:
        """The sample itself, or the first after it that is not known to be bad."""
        attempt, candidate = 0, sample_id
        while candidate in self.bad:
            attempt += 1
            if attempt == len(self._manifest):
                raise BadImage(f"{self._manifest.root}: no image can be decoded")
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
                    _, image = next(self._backend(iter([self._rows(step, np.array([good]))])))
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
        text = str(reason).removeprefix(f"{self._paths[sample_id]}: ")
        path = printable(self._paths[sample_id])
        if self._on_bad == "fail":
            raise BadImage(
                f"step {step}: {path}: {text}; run `deepmim-scale data verify "
                f"{self._manifest.root}` or use --on-bad replace"
            ) from reason
        self.bad[sample_id] = text
        print(f"step {step}: {path}: {text}; the next sample replaces it", file=sys.stderr)
