"""Saving and loading of a training run: weights, AdamW's state and the place in the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from deepmim_scale.checkpoint import files
from deepmim_scale.errors import RunFailure
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.runs.folder import step_folder, write_failure
from deepmim_scale.runs.state import CheckpointState, read_state


class Learned(Protocol):
    """What changes over a run beside the weights: an objective's teacher, or their average."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""


def save_checkpoint(
    run: str,
    engine: zero.Engine,
    learned: Learned | None,
    *,
    stage: int,
    writes: bool,
    state: CheckpointState,
) -> Path:
    """Write the checkpoint of `state.step`; every rank calls it, one of each stage `writes`.

    RunFailure on every rank if one of them cannot write; older checkpoints stay as they are.
    """
    final, is_main = step_folder(run, state.step), dist.get_rank() == 0
    moments = zero.optimizer_state(engine, keep=writes)
    weights = zero.master_weights(engine, keep=writes)
    if writes:
        # Decoders of one stage share their frozen position table: it is stored once.
        for name, parameter in global_parameters(engine.module).items():
            if not parameter.requires_grad:
                weights[name] = parameter.detach().float().cpu()

    def write_files() -> dict[str, str]:
        digests = {}
        kinds = {
            "weights": weights,
            "optimizer": moments,
            "objective": learned.state() if learned else {},
        }
        for kind, tensors in kinds.items():
            if not writes or not tensors:
                continue
            file = files.part_folder(final) / f"{kind}_stage{stage:02d}.safetensors"
            digests[file.name] = files.write_tensors(file, tensors)
        return digests

    try:
        _together(run, lambda: files.begin_checkpoint(final) if is_main else None)
        # Digests come from the ranks that wrote: on a network's file system rank 0 may not see the
        # files yet.
        everyone = _together(run, write_files)
        whole = dict(sorted(entry for part in everyone for entry in part.items()))
        update = {"loss_scaler": zero.scaler_state(engine), "sha256": whole}
        content = CheckpointState(**(dict(state) | update))
        _together(run, lambda: files.commit_checkpoint(final, content) if is_main else None)
    except RunFailure:
        if is_main:
            files.drop_part(final)
        raise
    return final


def _together(run: str, write: Callable[[], Any]) -> list[Any]:
    """What `write` gave on each rank; RunFailure on all of them if one could not write."""
    mine: tuple[Any, str] = (None, "")
    try:
        mine = (write(), "")
    except OSError as error:
        mine = (None, error.strerror or str(error))
    except SafetensorError as error:  # what safetensors makes of an OSError
        mine = (None, str(error))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    reasons = [reason for _, reason in everyone if reason]
    if reasons:
        raise write_failure(run, reasons[0])
    return [result for result, _ in everyone]


def load_weights(folder: Path, module: nn.Module) -> None:
    """Copy a checkpoint's weights into stages or a whole model, before their engine is built.

    ValueError names a weight that the checkpoint does not have or whose shape differs.
    """
    everything = global_parameters(module)
    parameters = {n: p for n, p in everything.items() if p.requires_grad}
    # A frozen position table may be another than the model's own: `--init-from` brings it along.
    saved = files.tensor_names(folder, "weights")
    parameters |= {n: p for n, p in everything.items() if n in saved}
    tensors = files.read_tensors(folder, "weights", parameters)
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)} saved, {tuple(parameter.shape)} in the model"
            raise ValueError(f"{folder}: {name}: shape {shapes}")
        parameter.data.copy_(tensors[name])


def load_optimizer(folder: Path, engine: zero.Engine) -> None:
    """Restore AdamW's state and the loss scale into a fresh engine of any replica count."""
    names = [n for n, p in global_parameters(engine.module).items() if p.requires_grad]
    keys = [f"{moment}/{name}" for name in names for moment in zero.MOMENTS]
    state = read_state(folder)
    moments = files.read_tensors(folder, "optimizer", keys)
    zero.load_master_weights(engine, files.read_tensors(folder, "weights", names))
    zero.load_optimizer_state(engine, moments, state.updates)
    zero.load_scaler_state(engine, state.loss_scaler)


def load_learned(folder: Path, learned: Learned) -> None:
    """Restore what an objective or an average holds; frozen teachers have nothing to restore."""
    names = learned.state()
    if names:
        learned.load_state(files.read_tensors(folder, "objective", names))
