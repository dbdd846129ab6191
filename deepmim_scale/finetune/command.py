"""Fine-tuning from the command line: all checks first, then processes and training."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from deepmim_scale.arguments import is_main_process, parse, run_command
from deepmim_scale.errors import RunFailure, Stopped, UserError
from deepmim_scale.finetune.presets import FINETUNE_PRESETS, load_finetune_preset
from deepmim_scale.finetune.settings import FinetuneConfig
from deepmim_scale.flags import check_flags, flags_of, given_flags
from deepmim_scale.ranks import adopt_ranks, check_ranks
from deepmim_scale.runs import stop
from deepmim_scale.runs.lock import held
from deepmim_scale.settings import shown_as

if TYPE_CHECKING:
    import torch

    from deepmim_scale.finetune.prepare import PreparedFinetune

# Flags of facebookresearch/mae, main_finetune.py, that have another name here or none.
MAE_FINETUNE_FLAGS: dict[str, str] = {
    "--model": "--preset, e.g. finetune_mae_b",
    "--finetune": "the first word, a run or a file",
    "--batch_size": "--microbatch-size",
    "--accum_iter": "--microbatches or --global-batch",
    "--lr": "--blr",
    "--input_size": "--img-size",
    "--data_path": "--data",
    "--output_dir": "--output",
    "--log_dir": "--output",
    "--nb_classes": "nothing: the folders of --data",
    "--global_pool": "--pool mean (the default)",
    "--cls_token": "--pool class",
    "--aa": "--auto-augment",
    "--reprob": "--erase",
    "--dist_eval": "nothing: every image is counted once on any number of processes",
    "--num_workers": "--loader-workers",
}


class _HelpedFinetune(FinetuneConfig):
    """One fine-tuning run: an encoder of any origin learns the classes of an image folder."""

    preset: Annotated[
        str, shown_as("NAME", f"Start from one of: {', '.join(FINETUNE_PRESETS)}.")
    ] = ""


def parse_finetune(argv: Sequence[str], *, prog: str) -> FinetuneConfig:
    """The run that a command line asks for: a preset, then flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--local_rank", "--local-rank", help="given by the deepspeed launcher")
    try:
        start, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: needs a value; give one after it") from None
    given = given_flags(rest)
    default = load_finetune_preset(start.preset) if start.preset else FinetuneConfig()
    if "--help" in given or "-h" in rest:
        parse(_HelpedFinetune, ["--help"], prog=prog, default=_HelpedFinetune(**dict(default)))
    check_flags(rest, flags_of(FinetuneConfig), prog, MAE_FINETUNE_FLAGS)
    if "--steps" in given and "--epochs" in given:
        raise UserError(
            f"steps={given['--steps']}: is a length, as epochs={given['--epochs']} is; "
            "give one of the two"
        )
    if "--microbatches" in given and "--global-batch" not in given:
        default = default.replace(global_batch=None)
    config = parse(FinetuneConfig, rest, prog=prog, default=default, theirs=MAE_FINETUNE_FLAGS)
    return config.replace(output=config.output or f"runs/{config.preset or 'finetune'}")


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune as `config` says, in the processes that the launcher started."""
    is_main = is_main_process()
    stop.limit_time(config.stop_after)
    from deepmim_scale.finetune.prepare import describe, prepare

    prepared = prepare(config)
    is_first = os.environ.get("RANK", "0") == "0"
    holds = is_first and not config.evaluates_only
    with held(config.output) if holds else contextlib.nullcontext("") as note:
        if is_first:
            lines = [*describe(prepared), *([note] if note else [])]
            print("\n".join(lines), flush=True)
        _run(prepared, is_main)


def _run(prepared: PreparedFinetune, is_main: bool) -> None:
    import torch

    from deepmim_scale.data.backend import BadImage
    from deepmim_scale.parallel import failure, zero
    from deepmim_scale.train.agreement import check_same_data

    config = prepared.config
    failure.limit_waits(config.timeout)
    try:
        device = zero.init_processes(config.timeout)
        sources = prepared.sources
        check_same_data(config.data, (sources.train, sources.val))
        if config.evaluates_only:
            _evaluate(prepared, device)
        else:
            _train(prepared, device)
        torch.distributed.destroy_process_group()
    except Stopped:
        torch.distributed.destroy_process_group()
        raise
    except (UserError, RunFailure) as error:
        if isinstance(error, BadImage) and not is_main:  # only the rank that decoded it knows
            print(f"error: {error}", file=sys.stderr)
        raise
    except BrokenPipeError:  # of our own output, not of a peer
        raise
    except Exception as error:
        failure.leave(error, None)


def _evaluate(prepared: PreparedFinetune, device: torch.device) -> None:
    from deepmim_scale.finetune.trainer import evaluate_once

    counter = evaluate_once(prepared, device)
    if os.environ.get("RANK", "0") == "0":
        (right, likeliest, loss, images) = counter.counts[""]
        print(
            f"top-1 {100 * right / images:.2f} % ({right:.0f} of {images:.0f}), top-{prepared.top} "
            f"{100 * likeliest / images:.2f} % ({likeliest:.0f}), loss {loss / images:.4f}"
        )


def _train(prepared: PreparedFinetune, device: torch.device) -> None:
    from deepmim_scale.finetune.files import result_line, summarize
    from deepmim_scale.finetune.trainer import Finetuner
    from deepmim_scale.runs.folder import read_metrics

    tuner = Finetuner(prepared, device)
    say, output = tuner.progress.print_main, prepared.config.output
    for warning in tuner.start.warnings:
        say(warning)
    if tuner.finished:
        say(f"finished already: {tuner.step} steps, results in {output}")
        return
    if tuner.start.checkpoint is not None:
        say(f"resuming after step {tuner.step} from {tuner.start.checkpoint}")
    tuner.run()
    if tuner.rank == 0:
        say(f"done: {result_line(summarize(read_metrics(output)))}; results in {output}")


def main(argv: Sequence[str] | None = None, prog: str = "finetune") -> None:
    """Entry of `launcher/finetune.py`, `deepmim-scale finetune` and `--module`."""
    words = sys.argv[1:] if argv is None else argv

    def command() -> None:
        check_ranks()
        finetune(parse_finetune(words, prog=prog))

    adopt_ranks()
    if any(word in ("-h", "--help") for word in words) and not is_main_process():
        return
    with stop.listening():
        run_command(command)


if __name__ == "__main__":
    main()
