"""When a run saves and when it stops: agreed by all ranks with the norm of every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from deepmim_scale.checkpoint.saver import Saver
from deepmim_scale.errors import Stopped
from deepmim_scale.operation import Operation
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.gradients import Wishes
from deepmim_scale.runs import stop
from deepmim_scale.runs.folder import step_folder
from deepmim_scale.runs.state import CheckpointState


class Keeper:
    """Asks before a step, and saves or stops after it."""

    def __init__(
        self,
        config: Operation,
        output: str,
        engine: zero.Engine,
        saver: Saver,
        state: Callable[[], CheckpointState],
    ) -> None:
        self._config, self._output, self._engine = config, output, engine
        self._saver, self._state = saver, state
        self._saves = config.save_every > 0 or config.save_minutes > 0
        self._next_save = self._minutes_from_now()
        self._figures: dict[str, Any] = {}
        stop.begin_steps()

    def _minutes_from_now(self) -> float:
        minutes = self._config.save_minutes
        return time.monotonic() + 60 * minutes if minutes else float("inf")

    def ask(self) -> None:
        """Tell the other ranks, with the norm of the step to come, what this one wishes."""
        # One clock decides when time is up.
        is_time = dist.get_rank() == 0 and time.monotonic() >= self._next_save
        self._engine.gradients.wishes = Wishes(bool(stop.reason()), is_time, self._saver.failed)

    def figures(self) -> dict[str, Any]:
        """Entries of the next row: how long steps stood for a save, since the row before."""
        found, self._figures = self._figures, {}
        return found

    def after_step(self, step: int, *, finished: bool) -> None:
        """Save if it is due; Stopped if a rank has asked for it."""
        stop.step_taken()
        every, agreed = self._config.save_every, self._engine.gradients.agreed
        if agreed.fail:  # of all ranks at the same step, so that none waits for another
            self._saver.wait()
        by_steps = every > 0 and step % every == 0
        if self._saves and (by_steps or finished or agreed.save or agreed.stop):
            self._figures["save_stall_ms"] = 1e3 * self._saver.save(self._state())
            self._next_save = self._minutes_from_now()
        if finished or agreed.stop:
            self._saver.wait()
        if agreed.stop and not finished:
            stop.all_saved()
            raise Stopped(self._describe(step))

    def _describe(self, step: int) -> str:
        why = stop.reason() or "a wish of another rank"
        where = f"saved in {step_folder(self._output, step)}"
        if not self._saves:
            where = "nothing is saved, as --save-every 0 says"
        return f"stopped by {why} after step {step}, {where}; to go on: {stop.command()}"
