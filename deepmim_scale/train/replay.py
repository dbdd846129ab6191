"""A step of a run, executed again on one process with the sums of as many replicas as it had.

Legend: D replicas, M micro-batches per step and replica, B micro-batch, G = B M D.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepmim_scale.batch import Batch
from deepmim_scale.config import RunConfig, num_steps
from deepmim_scale.data.choose_backend import build_backend
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.step_loader import Share, Span, build_step_loader
from deepmim_scale.ds_config import precision_of
from deepmim_scale.errors import UserError
from deepmim_scale.methods import decoder_names, losses_of
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.runs.folder import (
    STARTS,
    list_checkpoints,
    load_run_config,
    read_metrics,
    read_starts,
    step_of,
)
from deepmim_scale.train.optim import peak_learning_rate, run_rate
from deepmim_scale.train.prepare import PreparedRun, prepare
from deepmim_scale.train.runtime import Runtime, build_runtime
from deepmim_scale.train.trainer import gradient_owner, total_loss

Found = dict[str, Any]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """How the processes of a start shared a step."""

    num_replicas: int
    microbatch_size: int
    microbatches: int


def replay(run: Path, step: int) -> Found:
    """Losses and norms of a step, and whether the loss is the recorded one."""
    config = load_run_config(run).replace(output=str(run))
    starts = read_starts(run)
    before = [f for f in list_checkpoints(run) if (step_of(f) or 0) < step]
    checkpoint = before[-1] if before else None
    first = (step_of(checkpoint) or 0) if checkpoint else 0
    layouts = [_layout(config, starts, number) for number in range(first, step)]
    if len(set(layouts)) > 1:
        raise UserError(
            f"step={step}: the processes changed between step {first} and it; "
            "choose a step nearer to a checkpoint"
        )
    if config.gradient_flow == "local" and config.stages > 1:
        raise UserError(
            "gradient_flow=local: no gradient crosses a cut, and one process has no cuts; "
            "replay runs of gradient_flow=full"
        )
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(_alone(config, layouts[0], folder))
        device = zero.init_processes(config.timeout)
        runtime = build_runtime(
            prepared.config,
            prepared.pipeline,
            prepared.ds_config,
            device,
            prepared.objective,
            checkpoint,
            prepared.initial,
        )
        replayed = _Replay(config, layouts[0], prepared, runtime, device)
        found: Found = {}
        for number, batches in enumerate(replayed.load(first, step), first):
            found = replayed.take(number, batches)
        torch.distributed.destroy_process_group()
    rows = [row for row in read_metrics(run) if row["step"] == step]
    recorded = rows[-1]["loss"] if rows else None
    # In a row null stands for NaN and infinity.
    loss = found["loss"] if math.isfinite(found["loss"]) else None
    equal = loss == recorded if rows else None
    start = checkpoint.name if checkpoint else "the first weights"
    found |= {"recorded": recorded, "equal": equal}
    return {"step": step, "from": start, **found, "loss": loss}


def _layout(config: RunConfig, starts: list[Found], number: int) -> Layout:
    """Of the start that took the step after `number` steps."""
    taken = [row for row in starts if row["step"] <= number]
    if not taken:
        raise UserError(f"run={config.output}: {STARTS} tells no start of that step")
    row = taken[-1]
    replicas = row["num_processes"] // row.get("stages", config.stages)
    size = row.get("microbatch_size", config.microbatch_size)
    assert config.global_batch is not None, "a run's settings are resolved"
    return Layout(replicas, size, config.global_batch // (size * replicas))


def _alone(config: RunConfig, layout: Layout, folder: str) -> RunConfig:
    """The settings of one replica in one process, which writes nothing."""
    return config.replace(
        output=folder,
        stages=1,
        placement="linear",
        layout="",
        schedule=RunConfig().schedule,
        schedule_file="",
        microbatch_size=layout.microbatch_size,
        microbatches=layout.microbatches,
        global_batch=None,
        log_blocks=0,
        trace=0,
        profile=False,
        resume="auto",
    )


class _Replay:
    """Steps of D replicas, one after another."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        prepared: PreparedRun,
        runtime: Runtime,
        device: torch.device,
    ) -> None:
        self._config, self._layout, self._prepared = config, layout, prepared
        self._runtime, self._device = runtime, device
        assert config.global_batch is not None, "a run's settings are resolved"
        self._samples = SamplePlan(len(prepared.train), config.seed, config.global_batch)
        self._packs: list[list[list[Tensor]]] = []
        given = prepared.ds_config.get("communication_data_type")
        precision = precision_of(prepared.ds_config)
        self._dtype: torch.dtype | None = _DTYPES[given] if given else None
        if not given and precision.is_autocast and layout.num_replicas > 1:
            self._dtype = getattr(torch, precision.product)

    def load(self, first: int, last: int) -> Iterator[list[list[Batch]]]:
        """M micro-batches of each replica, step by step."""
        config, layout = self._prepared.config, self._layout
        loaders = []
        for replica in range(layout.num_replicas):
            backend, _ = build_backend(
                config,
                self._prepared.train,
                layout.microbatch_size,
                self._device,
                config.loader,
                config.decode,
                config.prefetch,
            )
            loaders.append(
                build_step_loader(
                    config,
                    self._prepared.train,
                    self._samples,
                    Share(replica, layout.num_replicas, layout.microbatches),
                    Span(first, last - first),
                    backend=backend,
                    device=self._device,
                )
            )
        yield from (list(batches) for batches in zip(*loaders, strict=True))

    def take(self, number: int, batches: list[list[Batch]]) -> Found:
        """The step after `number` steps."""
        engine, config = self._runtime.engine, self._config
        names = losses_of(config.model)
        sums = dict.fromkeys(names, 0.0)
        self._packs, lines = [], []
        for replica, mine in enumerate(batches):
            for name, value in self._gradients(mine).items():
                # As the trainer: a replica's mean first, then their mean.
                sums[name] += float((value / len(mine)).double())
            if not all(map(math.isfinite, sums.values())):
                lines.append(f"replica {replica}: its loss is not finite")
        count = self._layout.num_replicas
        losses = {name: value / count for name, value in sums.items()}
        engine.optimizer.averaged_gradients = {
            i: [self._sum(i)] for i in range(len(engine.gradients.groups))
        }
        engine.gradients.norm = math.nan
        owners = ["encoder", *decoder_names(config.model).values()]
        norms = zero.gradient_norms(engine, owners, gradient_owner)
        _, applied = zero.apply_step(engine, self._rate(number))
        if applied:
            self._runtime.objective.after_step(global_parameters(engine.module))
        return {
            "loss": total_loss(config.model, losses),
            "losses": losses,
            "grad_norms": norms,
            "applied": applied,
            "microbatches": lines,
        }

    def _rate(self, number: int) -> float:
        config, per_epoch = self._config, self._samples.steps_per_epoch
        assert config.global_batch is not None, "a run's settings are resolved"
        peak = peak_learning_rate(config, config.global_batch)
        total = num_steps(config, per_epoch)
        return run_rate(config, peak, number / per_epoch, total / per_epoch)

    def _gradients(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Losses of a replica, whose gradients are kept as it would have sent them."""
        engine, executor = self._runtime.engine, self._runtime.executor
        gradients = engine.gradients
        packs: list[list[Tensor]] = [[] for _ in gradients.groups]
        start = gradients.start

        def keep(number: int) -> None:
            packs[number].append(gradients._pack(gradients.groups[number]))
            gradients._shards[number] = packs[number][-1]  # so that `finish` takes it as done

        gradients.start = keep
        try:
            calls = executor.num_backward_calls
            with zero.reduced_step(engine, self._config.reduction, calls) as backward:
                losses = executor.train([b.to(self._device) for b in batches], backward)
        finally:
            gradients.start = start
        self._packs.append(packs)
        return losses

    def _sum(self, number: int) -> Tensor:
        """A group's gradient, added over the replicas and then over what each sent in turn."""
        count, whole = self._layout.num_replicas, None
        for parts in zip(*(packs[number] for packs in self._packs), strict=True):
            if count == 1:
                part = parts[0]
            else:
                sent = [p.to(self._dtype or p.dtype).div_(count) for p in parts]
                part = sent[0]
                for other in sent[1:]:
                    part = part + other
            whole = part.float() if whole is None else whole.add_(part)
        assert whole is not None, "every group has a gradient"
        return whole
