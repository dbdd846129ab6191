"""Pre-training from the command line: all checks first, then torch, processes and training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from deepmim_scale.arguments import difference, is_speaker, parse_run, run_command
from deepmim_scale.config import ConfigError, RunConfig
from deepmim_scale.plan.training import TrainingPlan, training_plan


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _scientific(number: float) -> str:
    mantissa, exponent = f"{number:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def pretrain(config: RunConfig) -> None:
    """Pre-train as `config` says, in the processes that the launcher started."""
    from deepmim_scale.data.manifest import find_split, open_manifest
    from deepmim_scale.data.sample_plan import SamplePlan
    from deepmim_scale.ds_config import (
        bundled,
        load_ds_config,
        precision_of,
        resolve_batch,
        resolve_ds_config,
    )
    from deepmim_scale.train.run_folder import check_output
    from deepmim_scale.train.teachers import build_teacher, check_teacher

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % config.stages:
        raise ConfigError(
            f"stages={config.stages}: must divide the {world} processes; "
            "change --stages or the launcher's number of processes"
        )
    config = check_teacher(config)
    batch = resolve_batch(config, num_replicas=world // config.stages)
    pipeline = training_plan(config, batch.microbatches)
    config = config.model_copy(update={"global_batch": batch.global_batch, "microbatches": None})
    given = load_ds_config(config.deepspeed_config) if config.deepspeed_config else None
    ours = check_output(config)
    if not config.data:
        raise ConfigError("data: missing; give an image folder, see `deepmim-scale data samples`")
    train_folder, held_out_folder = (find_split(config.data, split) for split in ("train", "val"))
    assert train_folder is not None, "find_split raises where there is no training folder"
    train = open_manifest(train_folder, config.on_bad)
    held_out = open_manifest(held_out_folder, config.on_bad) if held_out_folder else None
    samples = SamplePlan(len(train), config.seed, batch.global_batch)

    import torch

    from deepmim_scale.parallel import failure, zero
    from deepmim_scale.parallel.executor import Executor
    from deepmim_scale.train.trainer import Task, Trainer

    if given is None:
        given = load_ds_config(bundled(_default_ds_config()))
    if precision_of(given) in ("float16", "pure_float16") and not torch.cuda.is_available():
        raise ConfigError(
            f"deepspeed_config={config.deepspeed_config}: float16 needs a GPU; "
            "use ds_configs/cpu_fp32.json"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.kernels == "triton" and not (torch.cuda.is_available() or interpreted):
        raise ConfigError("kernels=triton: needs a GPU; use --kernels auto")
    ds_config, filled_in = resolve_ds_config(given, config, batch)
    if config.optimizer == "apex":
        zero.check_apex()
    # On every rank, so that a mistake is told before any rank waits for another.
    teacher = build_teacher(config)
    if _speaks():
        print(f"preset {config.preset}: {' '.join(difference(config)) or 'unchanged'}")
        print(f"data: {train.describe()}" + (f"; held out {len(held_out)}" if held_out else ""))
        for note in (*train.notes, *(held_out.notes if held_out else ())):
            print(f"data: {note}")
        print(f"deepspeed: {' '.join(filled_in)}")
        rate = config.blr * batch.global_batch / 256
        print(f"{batch}; lr = {_scientific(config.blr)} x {batch.global_batch}/256 "
              f"= {_scientific(rate)}", flush=True)  # fmt: skip
        if config.stages > 1:
            print(_describe(pipeline, config, batch.microbatches), flush=True)
    failure.limit_waits(config.timeout)
    executor: Executor | None = None
    device = zero.init_processes(config.timeout)
    task = Task(config, ds_config, batch, samples, pipeline, train, held_out, ours, teacher)
    try:
        trainer = Trainer(task, device)
        executor = trainer.executor
        executor.on_failure = lambda error: failure.leave(error, executor)
        say = trainer.progress.say
        if trainer.finished:
            say(f"finished already: {trainer.step} steps, results in {config.output}")
            return
        if trainer.checkpoint is not None:
            say(f"resuming after step {trainer.step} from {trainer.checkpoint}")
        warmup_steps = config.warmup_epochs * samples.steps_per_epoch
        if trainer.total_steps < warmup_steps:
            say(f"warning: all {trainer.total_steps} steps lie in the warm-up of {warmup_steps:g}")
        trainer.run()
        say(f"done: {trainer.step} steps, results in {config.output}")
    except RuntimeError as error:
        failure.leave(error, executor)
    finally:
        torch.distributed.destroy_process_group()


def _describe(pipeline: TrainingPlan, config: RunConfig, microbatches: int) -> str:
    idle = pipeline.built.timeline.idle_fraction
    text = (
        f"pipeline: {config.stages} stages {pipeline.text}, {config.schedule}, {config.placement}, "
        f"{microbatches} micro-batches; simulated idle share {idle:.1%}"
    )
    if microbatches < config.stages:
        text += (
            f"\nwarning: microbatches={microbatches}: fewer than the {config.stages} stages, which "
            f"idle {idle:.1%} of the time (simulated); raise --microbatches"
        )
    return text


def _default_ds_config() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu_fp32.json"
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    return "a100_bf16.json" if has_bf16 else "v100_fp16.json"


def main(argv: Sequence[str] | None = None, prog: str = "pretrain") -> None:
    """Entry of `launcher/pretrain.py`, `deepmim-scale pretrain` and `--module`."""
    words = sys.argv[1:] if argv is None else argv

    def command() -> None:
        pretrain(parse_run(words, prog=prog))

    if any(word in ("-h", "--help") for word in words) and not is_speaker():
        return
    run_command(command)


if __name__ == "__main__":
    main()
