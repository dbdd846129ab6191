"""DeepSpeed's engine: everything of it that is private or young is touched here and nowhere else.

One plain DeepSpeedEngine per pipeline stage, whose `mpu` is the grid of stages and replicas, gives
ZeRO-2 over the stage's replicas, and gradient norm and overflow vote over all stages. What
this file assumes of the installed release is checked by tests/distributed/test_two_processes.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepmim_scale.ds_config import precision_of
from deepmim_scale.errors import UserError
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.pipeline.registry import Reduction
from deepmim_scale.precision import Precision

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

Engine = Any  # a deepspeed.DeepSpeedEngine, which has no types
MOMENTS = ("exp_avg", "exp_avg_sq")
_COMMUNICATION = {"bfloat16": "bf16", "float16": "fp16"}
# Keys of our JSON that DeepSpeed does not read, or reads in a way that fails: with float16 its
# torch_autocast scales by a GradScaler that neither lowers its scale on overflow nor is voted.
_OURS = ("torch_autocast", "loss_scale")


def init_processes(timeout_seconds: float = 600.0) -> torch.device:
    """Start the process group of the launcher's ranks, or of one process; returns the device."""
    deepspeed_logger.setLevel(logging.WARNING)
    if "RANK" not in os.environ:  # plain python
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        # torchrun and deepspeed name the number of a node's ranks differently.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
        torch.cuda.set_device(device)
        # DeepSpeed takes its device from LOCAL_RANK. More ranks than GPUs serve for checks only:
        # NCCL refuses to share a GPU, gloo goes through host memory.
        os.environ["LOCAL_RANK"] = str(device.index)
        backend = "nccl" if ranks <= gpus else "gloo"
        if backend == "gloo" and os.environ["RANK"] == "0":
            print(
                f"warning: {ranks} processes share the {gpus} GPUs they see: messages go through "
                "the host; let every process see all GPUs of its node",
                flush=True,
            )
    else:
        # Its shared-memory operation costs a build and serves inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return device


def build_grid(num_stages: int) -> PipelineParallelGrid:
    """Process grid: replicas of a stage adjacent, neighboring stages num_replicas ranks apart."""
    num_replicas = dist.get_world_size() // num_stages
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
        return PipelineParallelGrid(PipeDataParallelTopology(num_stages, num_replicas))


def build_optimizer(
    kind: Literal["adamw", "apex"],
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW of torch (fused on a GPU), or FusedAdam of NVIDIA apex."""
    if kind == "adamw":
        fused = device.type == "cuda"
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused)
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)


def build_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ds_config: dict[str, Any],
    grid: PipelineParallelGrid,
) -> Engine:
    """A ZeRO-2 engine for this rank's stage; ds_config is resolved (no "auto").

    ValueError if the stages have unequal numbers of parameter groups, which would hang.
    """
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(optimizer.param_groups))
    if len(set(counts)) > 1:
        raise ValueError(f"parameter groups per rank {counts}: must be equal on all stages")
    precision = precision_of(ds_config)
    settings = {key: value for key, value in ds_config.items() if key not in _OURS}
    settings.setdefault("steps_per_print", 2**31)
    # One replica has nobody to send gradients to: they keep their fp32.
    if precision.is_autocast and grid.get_data_parallel_world_size() > 1:
        settings.setdefault("communication_data_type", _COMMUNICATION[precision])
    if precision == "pure_float16":
        settings["fp16"] = {"hysteresis": 1} | settings["fp16"]  # one overflow halves the scale
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, mpu=grid, config=settings)
    engine.optimizer.check_grad_overflow = True  # else fp32 steps through NaN
    if hasattr(stage_1_and_2, "is_invalid_grad_norm"):
        # The reduced norm alone vetoes NaN and infinity. The scan of every gradient before it finds
        # nothing more, at 13 launches for each parameter. Older releases have no such veto.
        engine.optimizer.check_overflow = lambda *_, **__: None
    engine.optimizer.get_grad_norm_direct = partial(_reduced_norm, engine.optimizer)
    if precision == "float16":
        scale = ds_config.get("loss_scale", {})
        engine.optimizer.loss_scaler = DynamicLossScaler(
            init_scale=2.0 ** scale.get("initial_scale_power", 16),
            scale_window=scale.get("loss_scale_window", 2000),
            min_scale=scale.get("min_loss_scale", 1),
            delayed_shift=1,
            consecutive_hysteresis=False,
        )
        engine.optimizer.dynamic_loss_scale = True
    scaler = engine.optimizer.loss_scaler
    if isinstance(scaler, DynamicLossScaler):
        scaler.raise_error_at_min_scale = False  # the trainer counts skipped steps, and says so
    return engine


def _reduced_norm(optimizer: Any, gradients: list[Tensor], *_: Any, **__: Any) -> Tensor:
    """Norm of a parameter group's gradient over all stages, as DeepSpeed's, in a few launches."""
    pieces = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    total = torch.zeros((), device=optimizer.device)
    if pieces:
        norms = torch._foreach_norm(pieces, 2, torch.float32)
        total = torch.stack(norms).square().sum()
    # Over the replicas, which hold parts of the gradient, then over the stages.
    dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    return total.sqrt()


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The compute precision of one micro-batch; a no-op in fp32 and with pure 16-bit weights."""
    precision = Precision(precision)  # a name does, too
    if not precision.is_autocast:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision.product))


@contextlib.contextmanager
def reduced_step(
    engine: Engine, reduction: Reduction, num_calls: int
) -> Iterator[Callable[[Tensor], None]]:
    """The backward passes of one step: yields `backward(scalar)`, to be called num_calls times.

    coalesced: gradients stay whole on every rank and are reduced once, at the end. per_microbatch:
    each backward reduces and keeps its shard only; the last call closes the accumulation.
    """
    calls = 0

    def backward(loss: Tensor) -> None:
        nonlocal calls
        calls += 1
        last = reduction == "coalesced" or calls == num_calls
        engine.set_gradient_accumulation_boundary(last)
        # Releases differ in where they divide by M (0.19.1: in hooks of engine.forward): we do it.
        engine.backward(loss / engine.gradient_accumulation_steps(), scale_wrt_gas=False)

    coalesced = reduction == "coalesced"
    with engine.coalesce_grad_reduction() if coalesced else contextlib.nullcontext():
        try:
            yield backward
        except BaseException:
            # DeepSpeed reduces on its way out too, with peers that are elsewhere or gone, unless
            # there is nothing to reduce.
            engine.zero_grad()
            raise
    assert calls == num_calls, f"{calls} backward calls in a step of {num_calls}"


def gradient_norms(
    engine: Engine, owners: list[str], owner: Callable[[str], str]
) -> dict[str, Tensor]:
    """Norm of the reduced gradient of each owner's parameters, between reduction and step.

    `owner` maps a parameter's global name to one of `owners`, which is the same list on all ranks.
    """
    names = {id(p): owners.index(owner(n)) for n, p in global_parameters(engine.module).items()}
    squares = torch.zeros(len(owners), device=engine.device)
    optimizer = engine.optimizer
    pieces, places = [], []
    for group, params in enumerate(optimizer.params_in_partition):
        gradients = optimizer.averaged_gradients[group]
        kept = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        for gradient, parameter in zip(kept, params, strict=False):
            pieces.append(gradient)
            places.append(names[id(parameter)])
    if pieces:
        # A few launches for all parameters instead of four for each.
        norms = torch._foreach_norm(pieces, 2, torch.float32)
        index = torch.tensor(places, device=engine.device)
        squares.index_add_(0, index, torch.stack(norms).square())
    dist.all_reduce(squares)  # every rank holds another part of the gradient
    found = squares.sqrt() / optimizer.loss_scale
    return dict(zip(owners, found.unbind(), strict=True))


def apply_step(engine: Engine, learning_rate: float) -> tuple[float, bool]:
    """Clip, vote on overflow and update; returns (gradient norm over all stages, applied).

    A parameter group with an `lr_scale` moves at that multiple of the rate.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    engine.set_gradient_accumulation_boundary(True)  # else step() silently does nothing
    skipped = engine.skipped_steps
    engine.step()
    norm, applied = engine.get_global_grad_norm(), engine.skipped_steps == skipped
    assert norm is not None, "the step was not taken: no gradient was reduced"
    return float(norm) if applied else math.inf, applied


def loss_scale(engine: Engine) -> float:
    """The factor by which losses are multiplied before backward; 1 without float16."""
    return float(engine.optimizer.loss_scale)


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


def optimizer_state(engine: Engine, keep: bool = True) -> dict[str, Tensor]:
    """AdamW's moments of this stage in full, as `exp_avg/<name>`, in the manner of the weights."""
    _link_optimizer_state(engine)
    found = (
        (f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment))
        for name, parameter in _trainable(engine)
        for moment in MOMENTS
    )
    return {name: value.cpu() for name, value in found if keep}


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


def check_apex() -> None:
    """UserError unless NVIDIA apex can be imported (PyPI's `apex` is another project)."""
    import importlib.util

    if importlib.util.find_spec("apex") is None:
        raise UserError("optimizer=apex: NVIDIA apex is not installed; use --optimizer adamw")
    if importlib.util.find_spec("apex.optimizers") is None:
        raise UserError(
            "optimizer=apex: the apex that is installed is PyPI's web toolkit, not NVIDIA's; "
            "uninstall it, or use --optimizer adamw"
        )
