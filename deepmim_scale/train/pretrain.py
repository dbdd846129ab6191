"""Pre-training from the command line: all checks first, then torch, processes and training."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepmim_scale.arguments import is_main_process, parse_run, run_command
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import RunFailure, Stopped, UserError
from deepmim_scale.ranks import adopt_ranks, check_ranks
from deepmim_scale.runs import stop
from deepmim_scale.runs.lock import held
from deepmim_scale.train.prepare import PreparedRun, describe, prepare

if TYPE_CHECKING:
    import torch

    from deepmim_scale.train.trainer import Trainer


def pretrain(config: RunConfig) -> None:
    """Pre-train as `config` says, in the processes that the launcher started."""
    is_main = is_main_process()
    stop.limit_time(config.stop_after)
    prepared = prepare(config)
    is_first = os.environ.get("RANK", "0") == "0"
    # Taken before anything is written and before the ranks wait for each other.
    with held(config.output) if is_first else contextlib.nullcontext("") as note:
        if is_first:
            lines = [*describe(prepared), *([note] if note else [])]
            print("\n".join(lines), flush=True)
        _train(prepared, is_main)


def _train(prepared: PreparedRun, is_main: bool) -> None:
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
            trainer.progress.print_main(
                f"done: {trainer.step} steps, results in {prepared.config.output}"
            )
        torch.distributed.destroy_process_group()
    except Stopped:
        torch.distributed.destroy_process_group()
        raise
    except (UserError, RunFailure) as error:
        # Only the rank that decoded it knows.
        if isinstance(error, BadImage) and not is_main:
            print(f"error: {error}", file=sys.stderr)
        raise
    except BrokenPipeError:  # of our own output, not of a peer
        raise
    except Exception as error:
        failure.leave(error, trainer.executor if trainer else None)


def _start(prepared: PreparedRun, device: torch.device) -> Trainer:
    from deepmim_scale.train.agreement import check_same_data
    from deepmim_scale.train.trainer import Trainer

    check_same_data(prepared.config.data, (prepared.train, prepared.validation))
    trainer = Trainer(prepared, device)
    say = trainer.progress.print_main
    warmup_steps = prepared.config.warmup_epochs * prepared.samples.steps_per_epoch
    start = trainer.start
    for warning in start.warnings:
        say(warning)
    if trainer.finished:
        say(f"finished already: {trainer.step} steps, results in {prepared.config.output}")
    elif start.checkpoint is not None:
        say(f"resuming after step {trainer.step} from {start.checkpoint}")
    elif trainer.total_steps < warmup_steps:
        say(f"warning: all {trainer.total_steps} steps lie in the warm-up of {warmup_steps:g}")
    return trainer


def main(argv: Sequence[str] | None = None, prog: str = "pretrain") -> None:
    """Entry of `launcher/pretrain.py`, `deepmim-scale pretrain` and `--module`."""
    words = sys.argv[1:] if argv is None else argv

    def command() -> None:
        check_ranks()
        pretrain(parse_run(words, prog=prog))

    adopt_ranks()

    if any(word in ("-h", "--help") for word in words) and not is_main_process():
        return
    with stop.listening():
        run_command(command)


if __name__ == "__main__":
    main()
