"""NVIDIA DALI as a backend: it decodes and resizes what threads of our own read from the source.

CUBIC with antialiasing, no fast IDCT, no EXIF rotation: PIL's pixels to 0.2 of 255 on average.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.source import Source

HARDWARE_LOAD = 0.65  # share of the images for the GPU's JPEG engine; pinned, it changes pixels
UNREADABLE = np.zeros(1, np.uint8)  # stands for a file that cannot be read; fails to decode
LARGEST_HINT = 1024  # pixels a side: buffers for ImageNet's usual sizes, allocated once


def stream(
    requests: Iterator[DecodeRequest],
    source: Source,
    size: tuple[int, int],
    threads: int,
    max_batch: int,
    decode: str = "cpu",
    device: torch.device | None = None,
    prefetch: int = 2,
) -> Iterator[tuple[DecodeRequest, torch.Tensor]]:
    """The backend: images uint8 [B, 3, *size] on `device` (None: CPU), `prefetch` batches ahead.

    `decode` is `cpu` or `mixed` (nvJPEG and the hardware engine). Raises BadImage with DALI's
    reason, which does not always name the file; the generator is finished then.
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # its stubs miss what is generated at import
    fn, types = dali.fn, dali.types
    on_gpu = device is not None and device.type == "cuda"
    reading = _read_ahead(requests, source, threads, prefetch)
    started: deque[tuple[DecodeRequest, str]] = deque()

    def columns() -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        request, files = next(reading)  # its StopIteration ends the pipeline's epoch
        # An error raised here would come before the images of the batches that are in work.
        started.append((request, next((file for file in files if isinstance(file, str)), "")))
        boxes = request.boxes
        corners, shapes = boxes[:, :2].copy(), boxes[:, 2:].copy()  # no strides in DALI
        data = [UNREADABLE if isinstance(file, str) else file for file in files]
        return data, corners, shapes, request.flips.astype(np.int32)[:, None]

    @dali.pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=max_batch,
        num_threads=threads,
        device_id=(device.index or 0) if device and on_gpu else None,
        prefetch_queue_depth=prefetch,
    )
    def graph() -> object:
        encoded, start, shape, flip = fn.external_source(source=columns, num_outputs=4, batch=True)
        hints = {}
        if decode == "mixed":
            hints = {
                "hw_decoder_load": HARDWARE_LOAD,
                "preallocate_width_hint": LARGEST_HINT,
                "preallocate_height_hint": LARGEST_HINT,
            }
        images = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            device=decode,
            output_type=types.RGB,
            adjust_orientation=False,
            use_fast_idct=False,
            **hints,
        )
        images = images.gpu() if on_gpu else images
        images = fn.resize(images, size=list(size), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.transpose(fn.flip(images, horizontal=flip), perm=[2, 0, 1])

    pipeline = graph()
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            _, unread = started[0]
            raise BadImage(f"DALI: {unread}" if unread else _reason(error)) from error
        images = torch.from_dlpack(output.as_tensor()).clone()
        if on_gpu:  # DALI writes its buffer again as soon as it runs again
            torch.cuda.current_stream(device).synchronize()
        yield started.popleft()[0], images


def _read_ahead(
    requests: Iterator[DecodeRequest], source: Source, threads: int, prefetch: int
) -> Iterator[tuple[DecodeRequest, list[np.ndarray | str]]]:
    """Requests with their files' bytes, or why a file cannot be read; `prefetch` in work."""
    pending: deque[tuple[DecodeRequest, list[Future[np.ndarray | str]]]] = deque()

    def read(sample_id: int) -> np.ndarray | str:
        try:
            # DALI takes no sample without bytes.
            return np.frombuffer(source.read(sample_id) or b"\0", np.uint8)
        except OSError as error:
            return f"{source.name(sample_id)}: {error.strerror or error}"

    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        for request in requests:
            pending.append((request, [pool.submit(read, i) for i in request.ids.tolist()]))
            if len(pending) == prefetch:
                first, files = pending.popleft()
                yield first, [file.result() for file in files]
        for request, files in pending:
            yield request, [file.result() for file in files]


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's report that says what failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    marks = ("Failed to decode", "nvImageCodec", "File mapping failed", "Assert", "rror")
    for mark in marks:
        for line in lines:
            if mark in line and not line.startswith("Error in"):
                return f"DALI: {line.rstrip(' :')}"
    return f"DALI: {lines[0]}"
