"""How many threads decode, and whether they are enough."""

from __future__ import annotations

import os
import time

from deepmim_scale.config import RunConfig

MAX_WAIT_SHARE = 0.05
WINDOW = 20  # steps


def num_decoding_threads(config: RunConfig) -> int:
    """What was asked for, else this host's cores over its processes, at least 1."""
    if config.loader_threads is not None:
        return config.loader_threads
    # A launcher that binds each process to its cores is not told apart from a small machine.
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class WaitWatch:
    """Tells once if steps wait for images for more than MAX_WAIT_SHARE of their time."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._steps, self._waited, self._began = -1, 0.0, time.perf_counter()
        self._is_done = False

    def after_step(self, wait_seconds: float) -> str:
        """A line of warning or nothing; called after each step with what it waited, s."""
        self._steps += 1
        if self._steps == 0:  # the first step waits for the first images, as every run must
            self._began = time.perf_counter()
            return ""
        self._waited += wait_seconds
        if self._steps < WINDOW or self._is_done:
            return ""
        share = self._waited / (time.perf_counter() - self._began)
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()
        self._is_done = share > MAX_WAIT_SHARE
        if not self._is_done:
            return ""
        return (
            f"warning: loader_threads={self._num_threads}: steps wait for images for {share:.0%} "
            "of their time; give more threads, --decode fast, or a copy by `data pack`"
        )
