"""The stages' images: each step's micro-batches, made one step ahead on a thread.

Legend: B micro-batch, M micro-batches per step, L patches, S side of the input.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from deepmim_scale.config import RunConfig
from deepmim_scale.data import torch_backend
from deepmim_scale.data.manifest import Manifest
from deepmim_scale.data.masks import mask_noise
from deepmim_scale.data.philox import VALIDATION_MASK
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips

CACHE_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    images: torch.Tensor
    """uint8 [B, 3, S, S]."""
    noise: torch.Tensor
    """float32 [B, L] in [0, 1); its stable argsort is the mask."""
    sample_ids: torch.Tensor
    """int64 [B], places in the manifest."""


class Feed:
    """Iterates over lists of M batches, one list per step; the next step is made meanwhile."""

    def __init__(self, load: Callable[[int], list[Batch]], start_step: int, num_steps: int) -> None:
        self.wait_seconds = 0.0
        """How long the last step had to be waited for, s."""
        self._load = load
        self._steps = range(start_step, start_step + num_steps)
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        # A daemon: a process that fails must not wait for a thread that waits for its peers.
        self._thread = threading.Thread(target=self._serve, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        try:
            for step in self._steps[:1]:
                self._requests.put(step)
            for step in self._steps:
                began = time.perf_counter()
                result = self._results.get()
                self.wait_seconds = time.perf_counter() - began
                if isinstance(result, BaseException):
                    raise result
                if step + 1 in self._steps:
                    self._requests.put(step + 1)
                yield result
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread; called by the end of an iteration, however it ends."""
        self._requests.put(None)
        self._thread.join(timeout=10.0)

    def _serve(self) -> None:
        while (step := self._requests.get()) is not None:
            try:
                self._results.put(self._load(step))
            except BaseException as error:  # it belongs to the thread that trains
                self._results.put(error)


def build_feed(
    config: RunConfig,
    manifest: Manifest,
    plan: SamplePlan,
    *,
    replica: int,
    num_replicas: int,
    num_microbatches: int,
    start_step: int,
    num_steps: int,
) -> Feed:
    """The training feed of one replica from `start_step` on, equal on all its stages."""
    size, num_patches = config.model.img_size, config.model.num_patches
    paths, read = manifest.paths, _reader(manifest)

    def load(step: int) -> list[Batch]:
        epoch, _ = plan.locate(step)
        batches = []
        for m in range(num_microbatches):
            ids = plan.micro_batch(step, m, replica, num_microbatches, num_replicas)
            sizes = manifest.heights[ids], manifest.widths[ids]
            images = torch_backend.decode(
                [paths[i] for i in ids],
                crops(plan.seed, epoch, ids, *sizes, config.min_crop),
                flips(plan.seed, epoch, ids),
                size,
                config.loader_threads,
                read,
            )
            batches.append(_batch(images, mask_noise(plan.seed, epoch, ids, num_patches), ids))
        return batches

    return Feed(load, start_step, num_steps)


def iter_validation(
    config: RunConfig, manifest: Manifest, *, replica: int, num_replicas: int
) -> Iterator[Batch]:
    """Held-out images of one replica in order, each once over the replicas, last batch partial.

    Resized as torch_backend.centre; masks are fixed (epoch 0, seed 0) so that losses compare.
    """
    size = config.model.img_size
    paths, read = manifest.paths, _reader(manifest)
    mine = np.arange(replica, len(manifest), num_replicas)
    for start in range(0, len(mine), config.microbatch_size):
        ids = mine[start : start + config.microbatch_size]
        images = torch_backend.batch(
            config.loader_threads,
            size,
            lambda path: torch_backend.centre(read(path), size),
            [paths[i] for i in ids],
        )
        noise = mask_noise(0, 0, ids, config.model.num_patches, VALIDATION_MASK)
        yield _batch(images, noise, ids)


def _batch(images: torch.Tensor, noise: np.ndarray, ids: np.ndarray) -> Batch:
    return Batch(images, torch.from_numpy(noise), torch.from_numpy(ids.copy()))


def _reader(manifest: Manifest) -> torch_backend.Read:
    """Decoded images of a small set stay in memory."""
    pixels = int((manifest.heights.astype(np.int64) * manifest.widths).sum())
    if 3 * pixels > CACHE_BYTES:
        return torch_backend.read_image
    return functools.cache(torch_backend.read_image)
