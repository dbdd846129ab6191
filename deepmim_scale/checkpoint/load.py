"""Loading of a training run: weights, AdamW's state and what is learned beside them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deepmim_scale.checkpoint import files
from deepmim_scale.checkpoint.saver import Learned
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.runs.state import read_state


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
    keys = [f"{moment}/{name}" for name in names for moment in zero_state.MOMENTS]
    state = read_state(folder)
    moments = files.read_tensors(folder, "optimizer", keys)
    zero_state.load_master_weights(engine, files.read_tensors(folder, "weights", names))
    zero_state.load_optimizer_state(engine, moments, state.updates)
    zero_state.load_scaler_state(engine, state.loss_scaler)


def load_learned(folder: Path, learned: Learned) -> None:
    """Restore what an objective or an average holds; frozen teachers have nothing to restore."""
    names = learned.state()
    if names:
        learned.load_state(files.read_tensors(folder, "objective", names))
