"""Pre-training from the command line: all checks first, then torch, processes and training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepmim_scale.arguments import is_main_process, parse_run, run_command
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.train.prepare import PreparedRun, describe, prepare

if TYPE_CHECKING:
    import torch

    from deepmim_scale.train.trainer import Trainer


def pretrain(config: RunConfig) -> None:
    """Pre-train as `config` says, in the processes that the launcher started."""
    speaks = is_main_process()
    prepared = prepare(config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(describe(prepared)), flush=True)
    import torch
    from deepmim_kernels import use_backend

    from deepmim_scale.data.backend import BadImage
    from deepmim_scale.parallel import failure, zero

    use_backend(prepared.config.kernels)
    failure.limit_waits(prepared.config.timeout)
    trainer: Trainer | None = None
    try:
        trainer = _start(prepared, zero.init_processes(prepared.config.timeout))
        if not trainer.finished:
            trainer.run()
            trainer.progress.print_main(f"done: {trainer.step} steps, results in {config.output}")
        torch.distributed.destroy_process_group()
    except UserError as error:
        # Only the rank that decoded it knows.
        if isinstance(error, BadImage) and not speaks:
            print(f"error: {error}", file=sys.stderr)
        raise
    except BrokenPipeError:  # of our own output, not of a peer
        raise
    except Exception as error:
        failure.leave(error, trainer.executor if trainer else None)


def _start(prepared: PreparedRun, device: torch.device) -> Trainer:
    from deepmim_scale.train.trainer import Trainer

    trainer = Trainer(prepared, device)
    say = trainer.progress.print_main
    warmup_steps = prepared.config.warmup_epochs * prepared.samples.steps_per_epoch
    if trainer.finished:
        say(f"finished already: {trainer.step} steps, results in {prepared.config.output}")
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

    if any(word in ("-h", "--help") for word in words) and not is_main_process():
        return
    run_command(command)


if __name__ == "__main__":
    main()
