"""When a run saves and when it stops: agreed by all ranks with the norm of every step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepmim_scale.checkpoint.saver import Saver
from deepmim_scale.errors import RunFailure, Stopped
from deepmim_scale.operation import Operation
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.digests import Digests
from deepmim_scale.parallel.gradients import Wishes
from deepmim_scale.runs import stop
from deepmim_scale.runs.folder import ALARMS, list_checkpoints, step_folder, step_of, writing
from deepmim_scale.runs.state import CheckpointState
from deepmim_scale.train.inject import Injector


class Keeper:
    """Asks before a step, and saves or stops after it."""

    def __init__(
        self,
        config: Operation,
        output: str,
        engine: zero.Engine,
        saver: Saver,
        state: Callable[[], CheckpointState],
        samples: Callable[[int], Sequence[int]],
    ) -> None:
        self._config, self._output, self._engine = config, output, engine
        self._saver, self._state, self._samples = saver, state, samples
        self._injector = Injector(config.inject, output, engine)
        self._digests: Digests | None = None
        if config.digest_every:
            self._digests = Digests(engine, config.digest_every, state().step)
            engine.gradients.guard = self._digests
        self._saves = config.save_every > 0 or config.save_minutes > 0
        self._next_save = self._minutes_from_now()
        self._figures: dict[str, Any] = {}
        stop.begin_steps()

    def _minutes_from_now(self) -> float:
        minutes = self._config.save_minutes
        return time.monotonic() + 60 * minutes if minutes else float("inf")

    @property
    def price(self) -> str:
        """What looking for silent corruption costs, in words; empty without it."""
        if self._digests is None:
            return ""
        return f"digests: 2 of {1e3 * self._digests.seconds():.1f} ms in every step"

    def ask(self, step: int) -> None:
        """Tell the other ranks, with the norm of the step to come, what this one wishes."""
        self._injector.strike(step)
        # One clock decides when time is up.
        is_time = dist.get_rank() == 0 and time.monotonic() >= self._next_save
        self._engine.gradients.wishes = Wishes(bool(stop.reason()), is_time, self._saver.failed)

    def figures(self) -> dict[str, Any]:
        """Entries of the next row: how long steps stood for a save, since the row before."""
        found, self._figures = self._figures, {}
        return found

    def after_step(self, step: int, *, applied: bool, finished: bool) -> None:
        """Save if it is due; Stopped if a rank has asked for it, RunFailure after an alarm."""
        stop.step_taken()
        every, agreed = self._config.save_every, self._engine.gradients.agreed
        if agreed.alarm:
            self._fail(step)
        # float16 skips steps until its loss scale fits.
        if not applied and zero.loss_scale(self._engine) == 1:
            self._record(step, ["gradients are not finite"])
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

    def _fail(self, step: int) -> None:
        assert self._digests is not None, "only digests raise an alarm"
        found = self._digests.found()
        self._saver.wait()
        self._record(step, found)
        # What changed since the step before may have been saved with it.
        good = [f for f in list_checkpoints(self._output) if (step_of(f) or 0) < step - 1]
        back = f"go on with --from {good[-1].name}" if good else "start again in another folder"
        raise RunFailure(
            f"step {step}: silent corruption ({'; '.join(found)}); "
            f"{replay_line(self._output, step)}; {back}, without that machine"
        )

    def _record(self, step: int, found: list[str]) -> None:
        """Name the inputs of a step, so that it can be looked at."""
        if dist.get_rank():
            return
        row = {"step": step, "found": found, "sample_ids": [int(i) for i in self._samples(step)]}
        with writing(self._output), (Path(self._output) / ALARMS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        stop.print_line(f"step {step}: {'; '.join(found)}; {replay_line(self._output, step)}")


def replay_line(output: str, step: int) -> str:
    """How to see a step again, in words."""
    return (
        f"its images are in {ALARMS}; see it again with deepmim-scale replay {output} --step {step}"
    )
