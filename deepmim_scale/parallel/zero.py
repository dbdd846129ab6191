"""DeepSpeed's engine: what of it is private or young is touched here and in `zero_state.py` alone.

One plain DeepSpeedEngine per pipeline stage, whose `mpu` is the grid of stages and replicas, gives
ZeRO-2 over the stage's replicas, and gradient norm and overflow vote over all stages. What
this file assumes of the installed release is checked by tests/distributed/test_two_processes.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from deepmim_scale.ds_config import precision_of
from deepmim_scale.parallel.gradients import FlatGroup, GradientReducer, Wishes, padded_groups
from deepmim_scale.parallel.grid import ProcessGrid
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.parallel.watch import limited
from deepmim_scale.parallel.weights import WeightGatherer
from deepmim_scale.pipeline.ir import Reduction
from deepmim_scale.precision import Precision

Engine = Any  # a deepspeed.DeepSpeedEngine, which has no types
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
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed adopts a group that exists. Its own would be bound to a GPU, which gloo refuses, and
    # which makes every later group a collective of all ranks.
    with limited(timeout_seconds):
        dist.init_process_group(backend, timeout=timeout)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    return device


def build_grid(num_stages: int) -> ProcessGrid:
    """Process grid: replicas of a stage adjacent, neighboring stages num_replicas ranks apart."""
    return ProcessGrid(num_stages)


def build_optimizer(
    kind: Literal["adamw", "apex"],
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """torch's AdamW, fused, or FusedAdam of NVIDIA apex."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)


def build_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ds_config: dict[str, Any],
    grid: ProcessGrid,
    *,
    rounds_weights: bool = False,
) -> Engine:
    """A ZeRO-2 engine for this rank's stage; ds_config is resolved (no "auto").

    With `rounds_weights` replicas get updated weights as autocast would round them.

    DeepSpeed shards, updates and gathers; gradients are summed by a `GradientReducer` of ours,
    group by group, so stages may differ in their number of parameter groups. ValueError if the
    replicas of one differ, which would hang.
    """
    counts: list[Any] = [None] * grid.get_data_parallel_world_size()
    replicas = grid.get_data_parallel_group()
    dist.all_gather_object(counts, len(optimizer.param_groups), group=replicas)
    if len(set(counts)) > 1:
        raise ValueError(f"parameter groups per rank {counts}: must be equal on all replicas")
    precision = precision_of(ds_config)
    settings = {key: value for key, value in ds_config.items() if key not in _OURS}
    settings.setdefault("steps_per_print", 2**31)
    # One replica has nobody to send gradients to: they keep their fp32.
    if precision.is_autocast and grid.get_data_parallel_world_size() > 1:
        settings.setdefault("communication_data_type", _COMMUNICATION[precision])
    if precision == "pure_float16":
        settings["fp16"] = {"hysteresis": 1} | settings["fp16"]  # one overflow halves the scale
    with padded_groups(module, optimizer, len(counts)), _without_muon():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, mpu=grid, config=settings
        )
    sharded: Any = engine.optimizer
    sharded.check_grad_overflow = True  # else fp32 steps through NaN
    # The reduced norm alone vetoes NaN and infinity, on all ranks alike. DeepSpeed would look
    # through every gradient before, at 13 launches for each parameter.
    sharded.check_overflow = partial(_check_norm, engine)
    sharded.scaled_global_norm = lambda *_, **__: torch.tensor(engine.gradients.norm)
    known = set(module.parameters())
    # Its hooks run at every parameter of every backward call, to reduce what we reduce.
    for hook in sharded._grad_acc_hooks:
        hook.remove()
    engine.gradients = GradientReducer(
        [
            _flat_group(flat, [p for p in parameters if p in known], group)
            for flat, parameters, group in zip(
                sharded.bit16_groups_flat,
                sharded.round_robin_bit16_groups,
                sharded.param_groups,
                strict=True,
            )
        ],
        sharded.dp_process_group,
        sharded.get_param_comm_dtype(next(module.parameters())),
    )
    engine.weights = WeightGatherer(
        engine.gradients.groups,
        sharded.bit16_groups_flat,
        sharded.dp_process_group,
        getattr(torch, precision.product) if rounds_weights and precision.is_autocast else None,
    )
    if precision == "float16":
        scale = ds_config.get("loss_scale", {})
        sharded.loss_scaler = DynamicLossScaler(
            init_scale=2.0 ** scale.get("initial_scale_power", 16),
            scale_window=scale.get("loss_scale_window", 2000),
            min_scale=scale.get("min_loss_scale", 1),
            delayed_shift=1,
            consecutive_hysteresis=False,
        )
        sharded.dynamic_loss_scale = True
    scaler = sharded.loss_scaler
    if isinstance(scaler, DynamicLossScaler):
        scaler.raise_error_at_min_scale = False  # the trainer counts skipped steps, and says so
    return engine


@contextlib.contextmanager
def _without_muon() -> Iterator[None]:
    """Hide an optimizer that DeepSpeed imports, and compiles, only to see that ours is another.

    That costs every process about 1 s of CPU.
    """
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # the import then fails, as DeepSpeed allows
    try:
        yield
    finally:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before


def _flat_group(flat: Tensor, parameters: list[nn.Parameter], group: dict[str, Any]) -> FlatGroup:
    # Weights are views of the flat buffer; releases differ in how they say where.
    offsets = [int(p.storage_offset() - flat.storage_offset()) for p in parameters]
    return FlatGroup(
        tuple(parameters),
        tuple(offsets),
        flat.numel(),
        group.get("part", ""),
        group.get("is_rounded", False),
    )


def _check_norm(engine: Engine, *_: Any, **__: Any) -> None:
    engine.optimizer.overflow = not math.isfinite(engine.gradients.norm)


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

    coalesced and overlapped: gradients stay whole on every rank until `engine.gradients` is told to
    sum a group, at the latest at the end. per_microbatch: a group is summed as soon as all its
    parameters have a gradient, and only its shard is kept.
    """
    gradients, calls = engine.gradients, 0
    # Releases differ in where they divide by M: we do it, and need nothing else of their backward.
    microbatches, scale = engine.gradient_accumulation_steps(), loss_scale(engine)

    def backward(loss: Tensor) -> None:
        nonlocal calls
        calls += 1
        loss = loss / microbatches
        (loss if scale == 1 else loss * scale).backward()
        if reduction == "per_microbatch":
            gradients.start_complete()

    try:
        yield backward
    except BaseException:
        gradients.drop()
        raise
    assert calls == num_calls, f"{calls} backward calls in a step of {num_calls}"
    shards = gradients.finish()
    engine.optimizer.averaged_gradients = {i: [shard] for i, shard in enumerate(shards)}
    gradients.norm = math.nan
    if gradients.guard is not None:
        gradients.guard.before_update()


def gradient_norms(
    engine: Engine, owners: list[str], owner: Callable[[str], str]
) -> dict[str, float]:
    """Norm of the reduced gradient of each owner's parameters, between reduction and step.

    `owner` maps a parameter's global name to one of `owners`, which is the same list on all ranks.
    The host waits here once for the device; the norm of all of them is the step's veto.
    """
    names = {id(p): owners.index(owner(n)) for n, p in global_parameters(engine.module).items()}
    gradients, count = engine.gradients, len(owners)
    squares = torch.zeros(count + len(Wishes._fields), device=engine.device)
    for place, wish in enumerate(gradients.wishes):
        if wish:
            squares[count + place] = 1.0
    if gradients.guard is not None:  # its verdict stays on the device
        squares[-1:] = gradients.guard.alarm
    pieces, places = [], []
    for number, group in enumerate(gradients.groups):
        (shard,) = engine.optimizer.averaged_gradients[number]
        first = dist.get_rank(gradients.process_group) * len(shard)
        for parameter, start, end in group.pieces(first, first + len(shard)):
            pieces.append(shard[start:end])
            places.append(names[id(parameter)])
    if pieces:
        # A few launches for all parameters instead of four for each.
        norms = torch._foreach_norm(pieces, 2, torch.float32)
        index = torch.tensor(places).to(engine.device, non_blocking=True)
        squares.index_add_(0, index, torch.stack(norms).square())
    dist.all_reduce(squares)  # every rank holds another part of the gradient
    values: list[float] = squares.double().tolist()
    found, wishes = values[:count], values[count:]
    gradients.agreed = Wishes(*(number > 0 for number in wishes))
    gradients.norm = math.sqrt(sum(found)) if math.isfinite(sum(found)) else math.inf
    return {n: math.sqrt(x) / loss_scale(engine) for n, x in zip(owners, found, strict=True)}


def apply_step(
    engine: Engine, learning_rate: float, *, overlap: bool = False
) -> tuple[float, bool]:
    """Clip, vote on overflow and update; returns (gradient norm over all stages, applied).

    A parameter group with an `lr_scale` moves at that multiple of the rate. With `overlap` other
    replicas' weights are still on their way: `engine.weights` waits for them, part by part.
    """
    engine.weights.finish()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    if math.isnan(engine.gradients.norm):
        gradient_norms(engine, ["all"], lambda name: "all")
    norm = engine.gradients.norm / loss_scale(engine)
    engine.set_gradient_accumulation_boundary(True)  # else step() silently does nothing
    skipped = engine.skipped_steps
    with _gathered_by_us(engine):
        engine.step()
    if not overlap:
        engine.weights.finish()
    applied = engine.skipped_steps == skipped
    if engine.gradients.guard is not None:
        engine.gradients.guard.after_update()
    return norm if applied else math.inf, applied


@contextlib.contextmanager
def _gathered_by_us(engine: Engine) -> Iterator[None]:
    """Where DeepSpeed would hand updated weights to all replicas, our gatherer begins."""
    before = stage_1_and_2.all_gather_dp_groups
    stage_1_and_2.all_gather_dp_groups = lambda *_, **__: engine.weights.start()
    try:
        yield
    finally:
        stage_1_and_2.all_gather_dp_groups = before


def loss_scale(engine: Engine) -> float:
    """The factor by which losses are multiplied before backward; 1 without float16."""
    return float(engine.optimizer.loss_scale)
