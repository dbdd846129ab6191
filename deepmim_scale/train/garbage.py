"""Python's garbage collector, held back to the end of steps."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

EVERY = 100
"""Steps between collections."""


@contextlib.contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Yields what collects after every hundredth step; nothing is collected in between.

    A collection within a step stops one rank at a moment of its own, and all others wait for it.
    """
    gc.collect()
    gc.freeze()  # models and data sets live to the end
    gc.disable()

    def after(step: int) -> None:
        if step % EVERY == 0:
            gc.collect()

    try:
        yield after
    finally:
        gc.enable()
        gc.unfreeze()
