"""Saving and loading of a training run: weights, AdamW's state and the place in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from deepmim_scale.checkpoint import files
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.stages import global_parameters


def save_checkpoint(
    run: str, step: int, engine: zero.Engine, *, stage: int, replica: int, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step`; every rank calls it, replica 0 of each stage writes."""
    final, writes = files.step_folder(run, step), replica == 0
    if dist.get_rank() == 0:
        files.begin_checkpoint(final)
    moments = zero.optimizer_state(engine, keep=writes)
    weights = zero.master_weights(engine, keep=writes)
    dist.barrier()
    digests: dict[str, str] = {}
    if writes:
        # Decoders of one stage share their frozen position table: it is stored once.
        for name, parameter in global_parameters(engine.module).items():
            if not parameter.requires_grad:
                weights[name] = parameter.detach().float().cpu()
        for kind, tensors in (("weights", weights), ("optimizer", moments)):
            file = files.part_folder(final) / f"{kind}_stage{stage:02d}.safetensors"
            digests[file.name] = files.write_tensors(file, tensors)
    # From those who wrote: a network's file system may show rank 0 their files later.
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    if dist.get_rank() == 0:
        content = {"step": step, **state, "loss_scaler": zero.scaler_state(engine)}
        whole = {name: digest for part in everyone for name, digest in part.items()}
        files.commit_checkpoint(final, content, dict(sorted(whole.items())))
    dist.barrier()
    return final


def load_weights(folder: Path, module: nn.Module) -> None:
    """Copy a checkpoint's weights into stages or a whole model, before their engine is built.

    ValueError names a weight that the checkpoint does not have or whose shape differs.
    """
    parameters = {n: p for n, p in global_parameters(module).items() if p.requires_grad}
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
    state = files.read_state(folder)
    moments = files.read_tensors(folder, "optimizer", keys)
    zero.load_master_weights(engine, files.read_tensors(folder, "weights", names))
    zero.load_optimizer_state(engine, moments, state["updates"])
    zero.load_scaler_state(engine, state["loss_scaler"])
