"""Console script `deepmim-scale`: a table of commands, each imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from deepmim_scale import __version__
from deepmim_scale.arguments import parse, run_command
from deepmim_scale.errors import UserError

# words: (module, class of its arguments, function, what it does)
COMMANDS: dict[str, tuple[str, str, str, str]] = {
    "presets": (
        "plan.preset_table",
        "PresetsArguments",
        "run_presets",
        "list what can be trained, with sizes and costs",
    ),
    "plan": ("plan.commands", "PlanArguments", "plan", "predict every way to run on a cluster"),
    "schedule": (
        "plan.schedule_command",
        "ScheduleArguments",
        "schedule",
        "build, simulate and draw a step's schedule",
    ),
    "ranks": (
        "plan.rank_map",
        "RankMapArguments",
        "run_rank_map",
        "which GPU of which host holds which stage",
    ),
    "study": (
        "study.commands",
        "StudyArguments",
        "run_study",
        "predict or measure a model over depths, stages and schedules",
    ),
    "data samples": (
        "data.commands",
        "SamplesArguments",
        "run_samples",
        "write a small sample set",
    ),
    "data digits": (
        "data.commands",
        "DigitsArguments",
        "run_digits",
        "write the sample set's digits by class",
    ),
    "data scan": ("data.commands", "ScanArguments", "run_scan", "list images once"),
    "data stats": (
        "data.commands",
        "StatsArguments",
        "run_stats",
        "measure channels, mean and deviation",
    ),
    "data verify": ("data.commands", "VerifyArguments", "run_verify", "decode every image"),
    "data pack": ("data.commands", "PackArguments", "run_pack", "write a small copy of all images"),
    "evaluate digits": (
        "evaluate.commands",
        "DigitsArguments",
        "run_digits",
        "probe features on digits",
    ),
    "evaluate knn": (
        "evaluate.commands",
        "KnnArguments",
        "run_knn",
        "weighted k-NN on your classes",
    ),
    "evaluate linear": (
        "evaluate.commands",
        "LinearArguments",
        "run_linear",
        "linear probe on your classes",
    ),
    "evaluate linear-sgd": (
        "evaluate.probe_commands",
        "LinearSgdArguments",
        "run_linear_sgd",
        "MAE's linear probe, by LARS",
    ),
    "evaluate attentive": (
        "evaluate.probe_commands",
        "AttentiveArguments",
        "run_attentive",
        "attentive probe of every tapped block",
    ),
    "evaluate finetune-digits": (
        "evaluate.finetune_digits",
        "DigitsFinetuneArguments",
        "run_digits_finetune",
        "fine-tune on 100 digits, beside scratch",
    ),
    "analyze reconstruct": (
        "analysis.commands",
        "ReconstructArguments",
        "run_reconstruct",
        "draw what each decoder fills in",
    ),
    "analyze losses": (
        "analysis.commands",
        "LossesArguments",
        "run_losses",
        "draw each decoder's loss over a run",
    ),
    "analyze timeline": (
        "analysis.commands",
        "TimelineArguments",
        "run_timeline",
        "draw a traced step beside its simulation",
    ),
    "analyze attention": (
        "analysis.commands",
        "AttentionArguments",
        "run_attention",
        "how far each head looks",
    ),
    "analyze cka": (
        "analysis.commands",
        "CkaArguments",
        "run_cka",
        "how alike the blocks' features are",
    ),
    "export": (
        "checkpoint.commands",
        "ExportArguments",
        "run_export",
        "weights for timm, Hugging Face or the official code",
    ),
    "replay": (
        "train.replay_command",
        "ReplayArguments",
        "run_replay",
        "execute a step of a run again, to the bit",
    ),
    "verify": ("checkpoint.commands", "VerifyArguments", "run", "check a checkpoint's digests"),
}


# The British spelling of earlier releases.
ALIASES = {"analyse": "analyze"}


def _overview(group: str = "") -> str:
    lines = [
        f"  {words:26s}{command[3]}"
        for words, command in COMMANDS.items()
        if not group or words.split()[0] == group
    ]
    if not group:
        lines.insert(0, f"  {'pretrain':26s}pre-train in one process (see launcher/ for more)")
        lines.insert(1, f"  {'finetune':26s}fine-tune an encoder on your classes, likewise")
        lines.insert(2, f"  {'doctor':26s}check machines and network, likewise")
    usage = f"usage: deepmim-scale {f'{group} ' if group else ''}COMMAND [OPTIONS]"
    return "\n".join(
        [usage, "", *lines, "", "Every command has --help; --version says which release this is."]
    )


def _dispatch(argv: Sequence[str]) -> None:
    if argv and argv[0] == "--version":
        print(f"deepmim_scale {__version__}")
        return
    argv = [ALIASES.get(word, word) for word in argv[:1]] + list(argv[1:])
    groups = {words.split()[0] for words in COMMANDS if " " in words}
    group = argv[0] if argv and argv[0] in groups else ""
    rest = argv[1:] if group else argv
    if not rest or rest[0] in ("-h", "--help"):
        print(_overview(group))
        return
    for words, (module, arguments, function, _) in COMMANDS.items():
        length = len(words.split())
        if " ".join(argv[:length]) == words:
            code = importlib.import_module(f"deepmim_scale.{module}")
            given = parse(getattr(code, arguments), argv[length:], prog=f"deepmim-scale {words}")
            getattr(code, function)(given)
            return
    see = f"deepmim-scale {group}".strip()
    raise UserError(f"{' '.join(argv[:2])}: unknown command; see {see} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the console script."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "pretrain":
        from deepmim_scale.train.pretrain import main as pretrain

        pretrain(words[1:], prog="deepmim-scale pretrain")
        return
    if words and words[0] == "finetune":
        from deepmim_scale.finetune.command import main as finetune

        finetune(words[1:], prog="deepmim-scale finetune")
        return
    if words and words[0] == "doctor":
        from deepmim_scale.doctor.command import main as doctor

        doctor(words[1:])
        return
    run_command(lambda: _dispatch(words))


if __name__ == "__main__":
    main()
