"""A time-out for the waits of a start, which gloo alone does not keep: it may wait five times."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])
GRACE_SECONDS = 2.0
"""A time-out of torch's own says more, so it comes first."""


def place() -> str:
    """Which process this is, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process, with a line that says where it waits, if the block takes longer.

    An exception would not do: the thread that waits is inside gloo or NCCL.
    """
    timer = threading.Timer(seconds + GRACE_SECONDS, _leave, (seconds, threading.get_ident()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(seconds: float, thread: int) -> None:
    frames = traceback.extract_stack(sys._current_frames()[thread])
    ours = [f for f in frames if f.filename.startswith(_PACKAGE) and f.filename != __file__]
    where = f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "?"
    print(
        f"error: {place()}, starting, in {where}: not connected within timeout={seconds:g} s; "
        "does every host know the others by an address of their network? (docs/cluster.md)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
