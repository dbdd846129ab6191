"""When pieces of work start and end: host clock, or CUDA events where work is queued on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks moments; their distances are known once the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """This moment in the device's order of work."""
        if not self._on_gpu:
            return time.perf_counter()
        # The host runs ahead of the GPU: only the device knows when it gets here.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks, s; waits for the device to pass the later one."""
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
