"""The stages' images: each step's micro-batches, made one step ahead on a thread.

Legend: B micro-batch, M micro-batches per step, L patches, S side of the input.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from deepmim_scale.batch import Batch
from deepmim_scale.config import RunConfig
from deepmim_scale.data import torch_backend
from deepmim_scale.data.backend import Backend, BadImage
from deepmim_scale.data.backends import cached_reader
from deepmim_scale.data.decode_stream import DecodeStream, Job
from deepmim_scale.data.exchange import Decoded, Mode, StageExchange, checksum, own_microbatches
from deepmim_scale.data.manifest import Manifest
from deepmim_scale.data.masks import mask_noise
from deepmim_scale.data.philox import VALIDATION_MASK
from deepmim_scale.data.sample_plan import SamplePlan

CPU = torch.device("cpu")


class StepLoader:
    """Iterates over lists of M batches, one list per step; the next step is made meanwhile."""

    def __init__(
        self,
        load: Callable[[int], list[Batch]],
        start_step: int,
        num_steps: int,
        device: torch.device = CPU,
        exchange: StageExchange | None = None,
    ) -> None:
        self.wait_seconds = 0.0
        """How long the last step had to be waited for, s."""
        self._load, self._device, self._exchange = load, device, exchange
        self._steps = range(start_step, start_step + num_steps)
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        # A daemon: a process that fails must not wait for a thread that waits for its peers.
        self._thread = threading.Thread(target=self._serve, name="feed", daemon=True)
        self._thread.start()

    @property
    def received_bytes(self) -> int:
        """Bytes received from other stages so far."""
        return self._exchange.received_bytes if self._exchange else 0

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
                yield self._hand_over(result)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread; called by the end of an iteration, however it ends."""
        self._requests.put(None)
        self._thread.join(timeout=5.0)

    def _serve(self) -> None:
        while (step := self._requests.get()) is not None:
            try:
                self._results.put(self._make(step))
            except BaseException as error:  # it belongs to the thread that trains
                self._results.put(error)

    def _make(self, step: int) -> list[Batch]:
        if self._device.type != "cuda":
            return self._load(step)
        with torch.cuda.device(self._device), torch.cuda.stream(self._side_stream):
            batches = self._load(step)
            self._side_stream.synchronize()
            return batches

    @functools.cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def _hand_over(self, batches: list[Batch]) -> list[Batch]:
        """Memory of the side stream must not be reused before the trainer's stream is done."""
        if self._device.type == "cuda":
            for batch in batches:
                for tensor in batch.tensors().values():
                    tensor.record_stream(torch.cuda.current_stream(self._device))
        return batches


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
    group: dist.ProcessGroup | None = None,
    mode: Mode = "replicate",
    check_feed: int = 0,
    on_bad: Literal["fail", "replace"] = "fail",
    backend: Backend | None = None,
    device: torch.device = CPU,
) -> StepLoader:
    """The training feed of one replica from `start_step` on, equal on all its stages.

    `group` joins the replica's stages in their order and serves this feed only (its collectives
    run on the feed's thread); without it there is one stage. Every `check_feed` steps the stages
    compare checksums (0: never). `backend` is torch_backend's by default.
    """
    stage, num_stages = (group.rank(), group.size()) if group else (0, 1)
    batch = plan.global_batch // (num_microbatches * num_replicas)
    size, num_patches = config.model.img_size, config.model.num_patches
    own = own_microbatches(mode, num_microbatches, stage, num_stages)

    def job(number: int) -> Job:
        step, place = divmod(number, len(own))
        step += start_step
        m = own[place]
        return step, plan.micro_batch(step, m, replica, num_microbatches, num_replicas)

    backend = backend or functools.partial(
        torch_backend.stream, size=size, threads=config.loader_threads, read=cached_reader(manifest)
    )
    num_jobs = num_steps * len(own)
    decoding = DecodeStream(job, num_jobs, backend, manifest, plan, config.min_crop, on_bad)
    exchange = StageExchange(mode, group, num_microbatches, batch, size, device) if group else None

    def decode_own() -> list[Decoded]:
        decoded = (decoding() for _ in own)
        return [(torch.tensor(ids, device=device), images.to(device)) for ids, images in decoded]

    def load(step: int) -> list[Batch]:
        epoch, _ = plan.locate(step)
        batches = []
        for ids, images in exchange(decode_own) if exchange else decode_own():
            noise = mask_noise(plan.seed, epoch, ids.cpu().numpy(), num_patches)
            batches.append(Batch(images, torch.from_numpy(noise).to(device), ids))
        if exchange and check_feed and step % check_feed == 0:
            exchange.check(step, [checksum(*b.tensors().values()) for b in batches])
        return batches

    return StepLoader(load, start_step, num_steps, device, exchange)


def iter_validation(
    config: RunConfig,
    manifest: Manifest,
    *,
    replica: int,
    num_replicas: int,
    on_bad: Literal["fail", "replace"] = "fail",
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Validation images of one replica in order, each once over the replicas, last batch partial.

    Resized as torch_backend.center by the torch backend, whatever the loader; masks are fixed
    (epoch 0, seed 0) so that losses compare. An undecodable image raises BadImage, or with on_bad
    `replace` is left out and named on stderr.
    """
    size, paths, read = config.model.img_size, manifest.paths, cached_reader(manifest)
    mine = np.arange(replica, len(manifest), num_replicas)
    for start in range(0, len(mine), config.microbatch_size):
        ids = mine[start : start + config.microbatch_size]
        if on_bad == "replace":
            ids = np.array([i for i in ids if _decodes(paths[i], read)], np.int64)
            if not len(ids):
                continue
        chosen = [paths[i] for i in ids]
        images = torch_backend.decode_whole(chosen, size, config.loader_threads, read)
        noise = mask_noise(0, 0, ids, config.model.num_patches, VALIDATION_MASK)
        tensors = images, torch.from_numpy(noise), torch.from_numpy(ids)
        yield Batch(*(tensor.to(device) for tensor in tensors))


def _decodes(path: str, read: torch_backend.Read) -> bool:
    try:
        read(path)
    except BadImage as error:
        print(f"validation image left out: {error}", file=sys.stderr)
        return False
    return True
