"""What takes time beside a replayed schedule: threads that sleep for messages and for sums."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deepmim_scale.pipeline.builders import BuiltSchedule
from deepmim_scale.pipeline.ir import Durations, Instruction, last_gradients


class Sums:
    """Gradients summed one piece after another, beside what the rank computes."""

    def __init__(self, built: BuiltSchedule, durations: Durations) -> None:
        self._completing = last_gradients(built.schedule.style)
        self._durations = durations
        self._armed: dict[Instruction, Instruction] = {}
        self._done: set[Instruction] = set()
        self._queue: queue.Queue[float | None] = queue.Queue()
        self._thread = threading.Thread(target=self._sum)
        self._thread.start()

    def _sum(self) -> None:
        while (seconds := self._queue.get()) is not None:
            time.sleep(seconds)

    def reduce(self, step: Instruction) -> None:
        """Sum a part's gradients: now if they are there, else as they appear."""
        completing = replace(step, kind=self._completing[step.kind])
        if completing in self._done:
            self._queue.put(self._durations.of(step))
        else:
            self._armed[completing] = step

    def compute(self, step: Instruction, seconds: float) -> None:
        """Sleep for a computation; the pieces of an armed sum begin in between."""
        reduction = self._armed.get(step)
        if reduction is None:
            time.sleep(seconds)
        else:
            pieces = self._durations.pieces.get((reduction.kind, step.stage), 1)
            for _ in range(pieces):
                time.sleep(seconds / pieces)
                self._queue.put(self._durations.of(reduction) / pieces)
        self._done.add(step)

    def finish(self) -> None:
        """Wait for the last sum."""
        self._queue.put(None)
        self._thread.join()


class SlowChannels:
    """Sends that take as long as the simulation says, one after another on each channel."""

    def __init__(self, seconds: Mapping[Any, float]) -> None:
        self._seconds = seconds
        self._queues: dict[Any, queue.Queue[Any]] = {}
        self._threads: list[threading.Thread] = []

    def send(self, step: Any, start: Callable[[], Any]) -> None:
        """Call `start` after the message's time."""
        channel = step.message[:3]
        if channel not in self._queues:
            self._queues[channel] = queue.Queue()
            thread = threading.Thread(target=self._carry, args=(self._queues[channel],))
            thread.start()
            self._threads.append(thread)
        self._queues[channel].put((self._seconds.get(channel[:2], 0.0), start))

    def _carry(self, waiting: queue.Queue[Any]) -> None:
        while (entry := waiting.get()) is not None:
            seconds, start = entry
            time.sleep(seconds)
            start().wait()

    def finish(self) -> None:
        """Wait until all has left."""
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
