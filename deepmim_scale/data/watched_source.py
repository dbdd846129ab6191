"""A source whose reads are timed, so that a run that waits for images can say for which."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from deepmim_scale.data.source import Source, printable

STALL_SECONDS = 10.0


class WatchedSource:
    """Stands for `source`, whose members it has; `read` is timed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()  # reads come from many threads
        self._slowest = (0.0, -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, sample_id: int) -> bytes:
        """Bytes of an image, as the source reads it."""
        began = time.perf_counter()
        try:
            return self._source.read(sample_id)
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                self._slowest = max(self._slowest, (seconds, sample_id))

    def report(self, step: int, wait_seconds: float) -> dict[str, Any]:
        """The slowest read since the last report; {} if there was none.

        A step that waited longer than STALL_SECONDS is told on stderr, on the rank that waited.
        """
        with self._lock:
            (seconds, sample_id), self._slowest = self._slowest, (0.0, -1)
        name = printable(self._source.name(sample_id)) if sample_id >= 0 else ""
        if wait_seconds > STALL_SECONDS:
            slowest = f"slowest read {seconds:.1f} s: {name}" if name else "nothing was read"
            print(
                f"step {step}: waited {wait_seconds:.1f} s for images; {slowest}", file=sys.stderr
            )
        return {"slowest_read_ms": seconds * 1e3, "slowest_read": name} if name else {}
