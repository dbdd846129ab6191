"""Pre-training from the command line: all checks first, then torch, processes and training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepmim_scale.arguments import is_speaker, parse_run, run_command
from deepmim_scale.config import ConfigError, RunConfig
from deepmim_scale.train.prepare import Task, describe, prepare

if TYPE_CHECKING:
    import torch

    from deepmim_scale.train.trainer import Trainer


def pretrain(config: RunConfig) -> None:
    """Pre-train as `config` says, in the processes that the launcher started."""
    os.environ["DEEPMIM_KERNELS"] = config.kernels  # read when the kernels are imported
    task = prepare(config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(describe(task)), flush=True)
    import torch

    from deepmim_scale.data.backend import BadImage
    from deepmim_scale.parallel import failure, zero

    failure.limit_waits(task.config.timeout)
    trainer: Trainer | None = None
    try:
        trainer = _start(task, zero.init_processes(task.config.timeout))
        if not trainer.finished:
            trainer.run()
            trainer.progress.say(f"done: {trainer.step} steps, results in {config.output}")
        torch.distributed.destroy_process_group()
    except ConfigError as error:
        if isinstance(error, BadImage) and not is_speaker():  # only the rank that decoded it knows
            print(f"error: {error}", file=sys.stderr)
        raise
    except BrokenPipeError:  # of our own output, not of a peer
        raise
    except Exception as error:
        failure.leave(error, trainer.executor if trainer else None)


def _start(task: Task, device: torch.device) -> Trainer:
    from deepmim_scale.train.trainer import Trainer

    trainer = Trainer(task, device)
    say = trainer.progress.say
    warmup_steps = task.config.warmup_epochs * task.samples.steps_per_epoch
    if trainer.finished:
        say(f"finished already: {trainer.step} steps, results in {task.config.output}")
    elif trainer.checkpoint is not None:
        say(f"resuming after step {trainer.step} from {trainer.checkpoint}")
    elif trainer.total_steps < warmup_steps:
        say(f"warning: all {trainer.total_steps} steps lie in the warm-up of {warmup_steps:g}")
    return trainer


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
