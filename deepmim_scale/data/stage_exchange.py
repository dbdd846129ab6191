"""Micro-batches decoded by one stage, brought to all stages of a pipeline.

`rotate`: stage s decodes the micro-batches m with m % P == s and all gather. `first`: stage 0
decodes and broadcasts. The ids go ahead of the images, and ids of -1 say that their stage failed,
so no stage waits for images that never come.
Legend: B micro-batch, M micro-batches per step, P stages.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from deepmim_scale.data.backend import pixel_dtype
from deepmim_scale.image_format import ImageFormat

FeedMode = Literal["rotate", "first", "replicate"]
Decoded = tuple[torch.Tensor, torch.Tensor]  # ids int64 [B], images [B, C, H, W]


class PeerFailed(RuntimeError):
    """Another stage could not decode its images; its own message says why."""


class FeedMismatch(RuntimeError):
    """Stages hold different images, ids or noise for one micro-batch."""


def own_microbatches(mode: FeedMode, num_microbatches: int, stage: int, num_stages: int) -> range:
    """The micro-batches of a step that `stage` decodes."""
    if mode == "rotate":
        return range(stage, num_microbatches, num_stages)
    return range(num_microbatches if mode == "replicate" or stage == 0 else 0)


def received_bytes(
    mode: FeedMode, num_microbatches: int, stage: int, num_stages: int, batch: int, image_bytes: int
) -> int:
    """Bytes that `stage` receives per step: images and ids int64."""
    micro_batch = batch * (image_bytes + 8)
    if mode == "rotate":  # a round that is not full is padded
        return math.ceil(num_microbatches / num_stages) * (num_stages - 1) * micro_batch
    return num_microbatches * micro_batch if mode == "first" and stage > 0 else 0


class StageExchange:
    """One stage's end of the exchange; `group` is its own, its ranks in the order of the stages."""

    def __init__(
        self,
        mode: FeedMode,
        group: dist.ProcessGroup,
        num_microbatches: int,
        batch: int,
        image: ImageFormat,
        device: torch.device,
    ) -> None:
        self.received_bytes = 0
        """Counted where tensors arrive, since the start."""
        self._mode, self._group, self._num_microbatches = mode, group, num_microbatches
        self._batch, self._device = batch, device
        self._images_shape = (batch, image.channels, *image.size)
        self._dtype = pixel_dtype(image)

    def __call__(self, decode: Callable[[], list[Decoded]]) -> list[Decoded]:
        """All M micro-batches on every stage; `decode` makes this stage's own.

        Raises what `decode` raises, after telling the other stages, and PeerFailed on those.
        """
        if self._mode == "replicate":
            return decode()
        share = self._rotate if self._mode == "rotate" else self._first
        try:
            own = decode()
        except Exception:
            with contextlib.suppress(PeerFailed):
                share(None)
            raise
        return share(own)

    def _rotate(self, own: list[Decoded] | None) -> list[Decoded]:
        num_rounds = math.ceil(self._num_microbatches / self._group.size())
        ids = self._ids(own, num_rounds)
        all_ids = self._gather(ids)  # [P, rounds, B]
        self._require(all_ids.flatten(1))
        shared: list[Decoded] = []
        for number in range(num_rounds):
            mine = own[number][1] if own and number < len(own) else self._padding()
            images = self._gather(mine)
            shared += zip(all_ids[:, number], images, strict=True)
        return shared[: self._num_microbatches]

    def _first(self, own: list[Decoded] | None) -> list[Decoded]:
        ids = self._broadcast(self._ids(own, self._num_microbatches))
        self._require(ids[None].flatten(1))
        shared = []
        for m in range(self._num_microbatches):
            images = own[m][1] if own else self._padding()
            shared.append((ids[m], self._broadcast(images)))
        return shared

    def check(self, step: int, checksums: list[int]) -> None:
        """Compare the M checksums of a step over the stages; raises FeedMismatch."""
        mine = torch.tensor(checksums, device=self._device)
        table = self._gather(mine).T.tolist()  # [M, P]
        for m, sums in enumerate(table):
            usual = max(sums, key=sums.count)
            odd = [stage for stage, value in enumerate(sums) if value != usual]
            if odd:
                raise FeedMismatch(
                    f"step {step}, micro-batch {m}: stages {odd} hold other data than the rest; "
                    "files, library versions and --loader/--decode must be equal on all stages"
                )

    def _ids(self, own: list[Decoded] | None, count: int) -> torch.Tensor:
        ids = torch.zeros(count, self._batch, dtype=torch.int64, device=self._device)
        if own is None:
            return ids - 1
        for row, (own_ids, _) in zip(ids, own, strict=False):
            row.copy_(own_ids)
        return ids

    def _require(self, ids: torch.Tensor) -> None:
        failed = [stage for stage, row in enumerate(ids) if int(row.min()) < 0]
        if failed:
            raise PeerFailed(f"stages {failed} could not decode their images; see their messages")

    def _padding(self) -> torch.Tensor:
        return torch.zeros(self._images_shape, dtype=self._dtype, device=self._device)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        num_stages = self._group.size()
        out = mine.new_empty((num_stages, *mine.shape))
        # As bytes: communicators know no uint16.
        whole, part = out.flatten(0, 1).view(torch.uint8), mine.contiguous().view(torch.uint8)
        dist.all_gather_into_tensor(whole, part, group=self._group)
        self.received_bytes += (num_stages - 1) * mine.numel() * mine.element_size()
        return out

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor.view(torch.uint8), group=self._group, group_src=0)
        if self._group.rank() > 0:
            self.received_bytes += tensor.numel() * tensor.element_size()
        return tensor


def checksum(*tensors: torch.Tensor) -> int:
    """CRC-32 over the tensors' bytes."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.cpu().contiguous().numpy().data, value)
    return value
