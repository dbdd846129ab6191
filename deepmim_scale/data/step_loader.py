"""The stages' batches: each step's micro-batches, made one step ahead on a thread.

Legend: B micro-batch, M micro-batches per step, L patches.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from deepmim_scale.batch import Batch
from deepmim_scale.config import RunConfig
from deepmim_scale.data import torch_backend
from deepmim_scale.data.backend import Backend, BadImage
from deepmim_scale.data.decode_stream import DecodeJob, DecodeStream
from deepmim_scale.data.masks import mask_noise
from deepmim_scale.data.philox import VALIDATION_MASK
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import OnBad, Source, good_ids
from deepmim_scale.data.stage_exchange import (
    Decoded,
    FeedMode,
    StageExchange,
    checksum,
    own_microbatches,
)
from deepmim_scale.data.threads import num_decoding_threads

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Share:
    """The part of each global batch that one replica trains on."""

    dp_rank: int = 0
    num_replicas: int = 1
    num_microbatches: int = 1
    """M of this replica."""


@dataclass(frozen=True)
class Span:
    """The steps that a loader makes."""

    start_step: int
    num_steps: int


@dataclass(frozen=True)
class FeedOptions:
    """How the stages of a replica get their images."""

    mode: FeedMode = "replicate"
    check_every: int = 0
    """Steps between comparisons of the stages' batches; 0 never."""
    on_bad: OnBad = "fail"
    """What to do about a sample that cannot be decoded and was not known to be bad."""


class StepLoader:
    """Iterates over lists of M batches, one list per step; the next step is made meanwhile."""

    def __init__(
        self,
        load: Callable[[int], list[Batch]],
        span: Span,
        device: torch.device = CPU,
        exchange: StageExchange | None = None,
    ) -> None:
        self.wait_seconds = 0.0
        """How long the last step had to be waited for, s."""
        self._load, self._device, self._exchange = load, device, exchange
        self._steps = range(span.start_step, span.start_step + span.num_steps)
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        # A daemon: a process that fails must not wait for a thread that waits for its peers.
        self._thread = threading.Thread(target=self._serve, name="loader", daemon=True)
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


def build_step_loader(
    config: RunConfig,
    source: Source,
    plan: SamplePlan,
    share: Share,
    span: Span,
    options: FeedOptions = FeedOptions(),
    *,
    group: dist.ProcessGroup | None = None,
    backend: Backend | None = None,
    device: torch.device = CPU,
) -> StepLoader:
    """The training batches of one replica, equal on all its stages.

    `group` joins the replica's stages in their order and serves this loader only (its collectives
    run on the loader's thread); without it there is one stage. `backend` is torch_backend's by
    default.
    """
    stage, num_stages = (group.rank(), group.size()) if group else (0, 1)
    num_microbatches = share.num_microbatches
    batch = plan.global_batch // (num_microbatches * share.num_replicas)
    image, num_patches = config.model.image_format, config.model.num_patches
    own = own_microbatches(options.mode, num_microbatches, stage, num_stages)
    labels = torch.from_numpy(source.labels.astype(np.int64))

    def job(number: int) -> DecodeJob:
        step, place = divmod(number, len(own))
        step += span.start_step
        ids = plan.micro_batch(
            step, own[place], share.dp_rank, num_microbatches, share.num_replicas
        )
        return DecodeJob(step, ids)

    backend = backend or functools.partial(
        torch_backend.stream,
        read_image=torch_backend.image_reader(source, image),
        image=image,
        threads=num_decoding_threads(config),
    )
    num_jobs = span.num_steps * len(own)
    decoding = DecodeStream(job, num_jobs, backend, source, plan, config.min_crop, options.on_bad)
    exchange = (
        StageExchange(options.mode, group, num_microbatches, batch, image, device)
        if group
        else None
    )

    def decode_own() -> list[Decoded]:
        decoded = (decoding() for _ in own)
        # From pinned memory a copy does not wait; the loader's stream is waited for at the end.
        return [
            (torch.tensor(ids, device=device), images.to(device, non_blocking=True))
            for ids, images in decoded
        ]

    def load(step: int) -> list[Batch]:
        epoch, _ = plan.locate(step)
        batches = []
        for ids, images in exchange(decode_own) if exchange else decode_own():
            # Noise and labels follow from the ids, so they are not sent between stages.
            seen = ids.cpu()
            noise = torch.from_numpy(mask_noise(plan.seed, epoch, seen.numpy(), num_patches))
            batches.append(Batch(images, noise.to(device), ids, labels[seen].to(device)))
        if exchange and options.check_every and step % options.check_every == 0:
            exchange.check(step, [checksum(*b.tensors().values()) for b in batches])
        return batches

    return StepLoader(load, span, device, exchange)


def iter_validation(
    config: RunConfig,
    source: Source,
    *,
    dp_rank: int = 0,
    num_replicas: int = 1,
    ids: np.ndarray | None = None,
    on_bad: OnBad = "fail",
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Validation images of one replica in order, each once over the replicas, last batch partial.

    `ids` are the samples, int64 [any number] (default: all that are not known to be bad). Resized
    as torch_backend.center by the torch backend, whatever the loader; masks are fixed (epoch 0,
    seed 0) so that losses compare. An undecodable image raises BadImage, or with on_bad `replace`
    is left out and named on stderr.
    """
    image = config.model.image_format
    read_image, threads = torch_backend.image_reader(source, image), num_decoding_threads(config)
    mine = (good_ids(source) if ids is None else ids)[dp_rank::num_replicas]
    for start in range(0, len(mine), config.microbatch_size):
        chosen = mine[start : start + config.microbatch_size]
        if on_bad == "replace":
            chosen = np.array([i for i in chosen.tolist() if _decodes(i, read_image)], np.int64)
            if not len(chosen):
                continue
        images = torch_backend.decode_whole(chosen, read_image, image, threads)
        noise = mask_noise(0, 0, chosen, config.model.num_patches, VALIDATION_MASK)
        labels = source.labels[chosen].astype(np.int64)
        arrays = (torch.from_numpy(array) for array in (noise, chosen, labels))
        yield Batch(images.to(device), *(tensor.to(device) for tensor in arrays))


def _decodes(sample_id: int, read_image: torch_backend.ReadImage) -> bool:
    try:
        read_image(sample_id)
    except BadImage as error:
        print(f"validation image left out: {error}", file=sys.stderr)
        return False
    return True
