"""Saving beside the steps: shards are copied, and a thread gathers, writes and commits them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from deepmim_scale.checkpoint import files
from deepmim_scale.errors import RunFailure
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.grid import ProcessGrid, make_group
from deepmim_scale.parallel.shards import ShardCopies, gather_state
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.runs.folder import step_folder, write_failure
from deepmim_scale.runs.state import CheckpointState


class Learned(Protocol):
    """What changes over a run beside the weights: an objective's teacher, or their average."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""


class Saver:
    """Writes one checkpoint at a time; every rank has one and calls it at the same steps."""

    def __init__(
        self,
        run: str,
        engine: zero.Engine,
        learned: Learned | None,
        grid: ProcessGrid,
        *,
        keep: int,
        keep_every: int = 0,
    ) -> None:
        self._run, self._engine, self._learned = run, engine, learned
        self._keep, self._keep_every = keep, keep_every
        self._stage, self._is_main = grid.get_stage_id(), dist.get_rank() == 0
        stages = grid.stage_groups
        self._writer = stages[self._stage][0]
        # Communicators of the thread's own, on the host whatever the steps use.
        self._everyone = make_group([list(range(dist.get_world_size()))], backend="gloo")
        self._replicas = make_group(stages, backend="gloo")
        self._copies: ShardCopies | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save could not be written; `wait` then raises why."""
        return self._error is not None

    def save(self, state: CheckpointState) -> float:
        """Begin to write the checkpoint of `state.step`; returns how long the steps stood, s.

        It waits for the save before. RunFailure on every rank if that could not be written.
        """
        began = time.perf_counter()
        self.wait()
        self._copies = self._copies or ShardCopies(self._engine)
        self._copies.take()
        state = CheckpointState(
            **(dict(state) | {"loss_scaler": zero_state.scaler_state(self._engine)})
        )
        fixed, learned = self._copy_others()
        self._thread = threading.Thread(
            target=self._work, args=(state, fixed, learned), name="saver", daemon=True
        )
        self._thread.start()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Return when all is on disk; RunFailure on every rank if one of them cannot write.

        Older checkpoints stay as they are.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy_others(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Frozen parameters, and what is learned beside the weights; of the writer alone."""
        if dist.get_rank() != self._writer:
            return {}, {}
        # Decoders of one stage share their frozen position table: it is stored once.
        parameters = global_parameters(self._engine.module).items()
        fixed = {n: p.detach().float().cpu() for n, p in parameters if not p.requires_grad}
        learned = self._learned.state() if self._learned else {}
        return fixed, {name: value.detach().cpu().clone() for name, value in learned.items()}

    def _work(
        self, state: CheckpointState, fixed: dict[str, Tensor], learned: dict[str, Tensor]
    ) -> None:
        try:
            self._write(state, fixed, learned)
        except Exception as error:  # it belongs to the thread that trains
            self._error = error

    def _write(
        self, state: CheckpointState, fixed: dict[str, Tensor], learned: dict[str, Tensor]
    ) -> None:
        assert self._copies is not None, "copied before the thread begins"
        final, is_main = step_folder(self._run, state.step), self._is_main
        weights, moments = gather_state(
            self._engine, self._copies.tensors, self._replicas, self._writer
        )
        kinds = {"weights": weights | fixed, "optimizer": moments, "objective": learned}

        def write_files() -> dict[str, str]:
            digests = {}
            for kind, tensors in kinds.items():
                if tensors:
                    name = f"{kind}_stage{self._stage:02d}.safetensors"
                    file = files.part_folder(final) / name
                    digests[name] = files.write_tensors(file, tensors)
            return digests

        try:
            self._together(lambda: files.begin_checkpoint(final) if is_main else None)
            # Digests come from the ranks that wrote: on a network's file system rank 0 may not see
            # the files yet.
            everyone = self._together(write_files)
            whole = dict(sorted(entry for part in everyone for entry in part.items()))
            content = CheckpointState(**(dict(state) | {"sha256": whole}))

            def commit() -> None:
                if is_main:
                    files.commit_checkpoint(final, content)
                    files.prune(self._run, self._keep, self._keep_every)

            self._together(commit)
        except RunFailure:
            if is_main:
                files.drop_part(final)
            raise

    def _together(self, write: Callable[[], Any]) -> list[Any]:
        """What `write` gave on each rank; RunFailure on all of them if one could not write."""
        mine: tuple[Any, str] = (None, "")
        try:
            mine = (write(), "")
        except OSError as error:
            mine = (None, error.strerror or str(error))
        except SafetensorError as error:  # what safetensors makes of an OSError
            mine = (None, str(error))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._everyone)
        reasons = [reason for _, reason in everyone if reason]
        if reasons:
            raise write_failure(self._run, reasons[0])
        return [result for result, _ in everyone]
