"""Everything that is settled before processes start; users' mistakes end here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepmim_scale.arguments import difference
from deepmim_scale.checkpoint import networks
from deepmim_scale.config import RunConfig, num_steps
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.pixel_statistics import check_pixels, with_statistics
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import Source, good_ids
from deepmim_scale.data.staging import stage_source
from deepmim_scale.data.threads import num_decoding_threads
from deepmim_scale.ds_config import (
    BatchSizes,
    bundled,
    load_ds_config,
    precision_of,
    resolve_batch,
    resolve_ds_config,
)
from deepmim_scale.errors import UserError
from deepmim_scale.objectives import Objective, build_objective, objective_of
from deepmim_scale.plan.resolve import TrainingPlan, training_plan
from deepmim_scale.runs.lock import check_free
from deepmim_scale.runs.resume import check_output
from deepmim_scale.settings import RunLength, pluralize
from deepmim_scale.train.loggers import check_loggers

if TYPE_CHECKING:
    from deepmim_scale.checkpoint.initial import Initial

# The trainer's profiler schedule, in steps.
PROFILED = (11, 13)


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check."""

    config: RunConfig
    changes: list[str]
    """What was set beside the preset, as words."""
    ds_config: dict[str, Any]
    filled_in: list[str]
    """What replaced "auto" in DeepSpeed's JSON, as words."""
    batch: BatchSizes
    samples: SamplePlan
    pipeline: TrainingPlan
    train: Source
    validation: Source | None
    may_resume: bool
    """The output folder holds this run."""
    objective: Objective
    """Targets and losses, with their teacher on the CPU."""
    initial: Initial | None
    """What `--init-from` gives a run that begins."""


def prepare(config: RunConfig) -> PreparedRun:
    """Check a run for the processes that the launcher started; UserError for a mistake.

    What needs no torch comes first, so that most mistakes are told within a second.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % config.stages:
        raise UserError(
            f"stages={config.stages}: must divide the {pluralize(world, 'process', 'processes')}; "
            "change --stages or the launcher's number of processes"
        )
    if config.stages > 1 and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        # A send would then wait for its receiver, which waits in its own send.
        raise UserError(
            f"stages={config.stages}: never end under CUDA_LAUNCH_BLOCKING; unset it, or use "
            "--stages 1"
        )
    changes = difference(config)
    objective_of(config.model).check_run(config, networks)
    if not config.data:
        raise UserError("data: missing; give an image folder, see `deepmim-scale data samples`")
    batch = resolve_batch(config, num_replicas=world // config.stages)
    pipeline = training_plan(config, batch.microbatches)
    config = with_statistics(config)
    config = config.replace(global_batch=batch.global_batch, microbatches=None)
    given = load_ds_config(config.deepspeed_config) if config.deepspeed_config else None
    check_loggers(config.log_to)
    check_free(config.output)
    may_resume = check_output(config)
    train = open_source(config.data, "train", config.on_bad, config.cache)
    assert train is not None, "a source raises where there is nothing to train on"
    validation = open_source(config.data, "val", config.on_bad, config.cache)
    check_pixels(config, train)
    samples = SamplePlan(len(train), config.seed, batch.global_batch)
    check_length(config, samples.steps_per_epoch)
    _check_profile(config, num_steps(config, samples.steps_per_epoch))
    _check_trace(config, num_steps(config, samples.steps_per_epoch))

    given = given or load_ds_config(bundled(default_ds_config()))
    check_machine(given, config.deepspeed_config, config.optimizer)
    _check_kernels(config)
    ds_config, filled_in = resolve_ds_config(given, config, batch)
    # On every rank, so that a mistake is told before any rank waits for another.
    teacher = objective_of(config.model).load_teacher(config, networks)
    objective = build_objective(config.model, teacher)
    initial = None
    if config.init_from:
        from deepmim_scale.checkpoint.initial import initial_weights

        initial = initial_weights(config)
    if config.stage_to:  # last: it may take long
        threads = num_decoding_threads(config)
        train = stage_source(train, "train", config.stage_to, threads)
        validation = validation and stage_source(validation, "val", config.stage_to, threads)
    return PreparedRun(
        config,
        changes,
        ds_config,
        filled_in,
        batch,
        samples,
        pipeline,
        train,
        validation,
        may_resume,
        objective,
        initial,
    )


def check_length(config: RunLength, steps_per_epoch: int) -> None:
    """UserError for a run of no step."""
    if num_steps(config, steps_per_epoch) == 0:
        raise UserError(
            f"epochs={config.epochs:g}: less than a step, an epoch has "
            f"{pluralize(steps_per_epoch, 'step')}; raise --epochs or give --steps"
        )


def _check_profile(config: RunConfig, steps: int) -> None:
    if config.profile and steps < PROFILED[1]:
        raise UserError(
            f"profile=True: traces steps {PROFILED[0]} to {PROFILED[1]}, the run has "
            f"{pluralize(steps, 'step')}; give more --steps or leave --profile out"
        )


def _check_trace(config: RunConfig, steps: int) -> None:
    if config.trace > steps:
        raise UserError(
            f"trace={config.trace}: the run has {pluralize(steps, 'step')}; give one of them"
        )


def default_ds_config() -> str:
    """The bundled JSON that suits this machine."""
    import torch

    if not torch.cuda.is_available():
        return "cpu_fp32.json"
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    return "a100_bf16.json" if has_bf16 else "v100_fp16.json"


def check_machine(ds_config: dict[str, Any], given: str, optimizer: str) -> None:
    """UserError for a precision or an optimizer that this machine does not have."""
    import torch

    if precision_of(ds_config).product == "float16" and not torch.cuda.is_available():
        raise UserError(
            f"deepspeed_config={given}: float16 needs a GPU; use ds_configs/cpu_fp32.json"
        )
    if optimizer == "apex":
        _check_apex()


def _check_apex() -> None:
    """UserError unless NVIDIA apex can be imported (PyPI's `apex` is another project)."""
    if importlib.util.find_spec("apex") is None:
        raise UserError("optimizer=apex: NVIDIA apex is not installed; use --optimizer adamw")
    if importlib.util.find_spec("apex.optimizers") is None:
        raise UserError(
            "optimizer=apex: the apex that is installed is PyPI's web toolkit, not NVIDIA's; "
            "uninstall it, or use --optimizer adamw"
        )


def _check_kernels(config: RunConfig) -> None:
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.kernels == "triton" and not (torch.cuda.is_available() or interpreted):
        raise UserError("kernels=triton: needs a GPU; use --kernels auto")


def describe(prepared: PreparedRun) -> Iterator[str]:
    """What a run prints at its start, line by line."""
    config, batch = prepared.config, prepared.batch
    yield f"preset {config.preset or 'none'}: {' '.join(prepared.changes) or 'unchanged'}"
    validation = f"; validation {len(good_ids(prepared.validation))}" if prepared.validation else ""
    yield f"data: {prepared.train.describe()}{validation}"
    for note in (
        *prepared.train.notes,
        *(prepared.validation.notes if prepared.validation else ()),
    ):
        yield f"data: {note}"
    yield f"deepspeed: {' '.join(prepared.filled_in)}"
    if prepared.initial is not None and not prepared.may_resume:
        yield prepared.initial.note
    yield batch_line(config.blr, batch)
    if config.stages > 1:
        built = prepared.pipeline.built
        idle, schedule = built.timeline.idle_fraction, built.schedule
        count = pluralize(batch.microbatches, "micro-batch", "micro-batches")
        yield (
            f"pipeline: {config.stages} stages {prepared.pipeline.text}, {schedule.name}, "
            f"{schedule.pipeline.placement}, {count}; "
            f"simulated idle share {idle:.1%}"
        )
        if batch.microbatches < config.stages:
            yield (
                f"warning: microbatches={batch.microbatches}: fewer than the {config.stages} "
                f"stages, which idle {idle:.1%} of the time (simulated); raise --microbatches"
            )


def batch_line(blr: float, batch: BatchSizes) -> str:
    """MAE's arithmetic of batch and learning rate."""
    rate = blr * batch.global_batch / 256
    return f"{batch}; lr = {_scientific(blr)} x {batch.global_batch}/256 = {_scientific(rate)}"


def _scientific(number: float) -> str:
    mantissa, exponent = f"{number:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
