"""What DeepSpeed's engine holds beside the module: fp32 weights, moments, the loss scale.

Beside `zero.py` the one file that touches what is private of DeepSpeed.
Legend: D replicas, N values of a parameter group, n = N / D values of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.parallel.zero import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def _trainable(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in global_parameters(engine.module).items():
        if parameter.requires_grad:
            yield name, parameter


def master_weights(engine: Engine, keep: bool = True) -> dict[str, Tensor]:
    """The fp32 weights of this stage that the optimizer updates, on the CPU.

    Every replica must call it; those that do not `keep` them only take part and get nothing.
    """
    found = ((name, safe_get_full_fp32_param(p)) for name, p in _trainable(engine))
    return {name: value.cpu() for name, value in found if keep}


def load_master_weights(engine: Engine, weights: dict[str, Tensor]) -> None:
    """Inverse of `master_weights`; the module's own weights must be loaded already."""
    for name, parameter in _trainable(engine):
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))


def _link_optimizer_state(engine: Engine) -> None:
    # DeepSpeed links after the step of the first group, when the second one has no state yet.
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def flat_weights(engine: Engine) -> list[Tensor]:
    """The weights that this rank computes with, [N] for each parameter group."""
    engine.weights.finish()
    return list(engine.optimizer.bit16_groups_flat)


def shards(engine: Engine) -> Iterator[tuple[Tensor, ...]]:
    """This rank's part of each parameter group: fp32 weights and both moments, each [n]."""
    zero = engine.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        # No state before a first update: AdamW then begins with zeros.
        state = zero.optimizer.state.get(flat, {})
        none = None if state else torch.zeros_like(flat)
        yield (flat.detach(), *(state.get(moment, none) for moment in MOMENTS))


def load_optimizer_state(engine: Engine, state: dict[str, Tensor], step: int) -> None:
    """Set AdamW's moments from full tensors and its step count, whatever the replica count was.

    A fresh ZeRO optimizer has no state to write into; so it is made and linked here.
    """
    zero = engine.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        device = flat.device if zero.optimizer.defaults.get("fused") else "cpu"
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(step), device=device),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    for group in zero.optimizer.param_groups:
        group["step"] = step  # where apex counts; torch's AdamW does not look at it
    _link_optimizer_state(engine)
    for name, parameter in _trainable(engine):
        for moment in MOMENTS:
            value = state[f"{moment}/{name}"].to(parameter.device)
            safe_set_full_optimizer_state(parameter, value, moment)


def scaler_state(engine: Engine) -> dict[str, float]:
    """What a float16 run needs to go on with the same loss scale; empty otherwise."""
    scaler = engine.optimizer.loss_scaler
    if not isinstance(scaler, DynamicLossScaler):
        return {}
    return {key: getattr(scaler, key) for key in ("cur_scale", "cur_iter", "last_overflow_iter")}


def load_scaler_state(engine: Engine, state: dict[str, float]) -> None:
    """Inverse of `scaler_state`."""
    for key, value in state.items():
        setattr(engine.optimizer.loss_scaler, key, value)
