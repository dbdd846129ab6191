"""Names of flags: those there are, older ones, MAE's, and what to say of one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from deepmim_scale.errors import UserError
from deepmim_scale.objectives import HYBRID
from deepmim_scale.settings import FrozenConfig

# `--hybrid RUN` meant a target and its teacher.
ALIASES = {"--loss": ["--target"], "--hybrid": ["--target", HYBRID, "--teacher"]}

_LAUNCHER = "the launcher decides: python, torchrun or deepspeed"
# Flags of facebookresearch/mae, main_pretrain.py, that have another name here or none.
MAE_FLAGS: dict[str, str] = {
    "--model": "--preset, e.g. mae_vit_b_12",
    "--batch_size": "--microbatch-size",
    "--accum_iter": "--microbatches or --global-batch",
    "--lr": "--blr",
    "--min_lr": "nothing: the rate ends at 0",
    "--norm_pix_loss": "--norm-pix (the default) or --no-norm-pix",
    "--input_size": "--img-size",
    "--data_path": "--data",
    "--output_dir": "--output",
    "--log_dir": "--output",
    "--resume": "--resume auto, which goes on in the folder --output,",
    "--start_epoch": "--resume auto (the default)",
    "--num_workers": "--loader-threads",
    "--pin_mem": "nothing: the loader decides",
    "--no_pin_mem": "nothing: the loader decides",
    "--amp": "--deepspeed_config, e.g. ds_configs/a100_bf16.json",
    "--device": f"nothing: {_LAUNCHER}",
    "--world_size": f"nothing: {_LAUNCHER}",
    "--dist_on_itp": f"nothing: {_LAUNCHER}",
    "--dist_url": f"nothing: {_LAUNCHER}",
}


def normal(word: str) -> str:
    """A flag without its value, written with `-`."""
    return word.split("=")[0].replace("_", "-")


def flags_of(config_class: type[FrozenConfig]) -> dict[str, bool]:
    """Every flag there is, and whether it is a switch, which takes no value."""
    flags: dict[str, bool] = {}
    for name, field in config_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, FrozenConfig):
            flags |= flags_of(field.annotation)
            continue
        # tyro keeps another name of a flag beside the field's type.
        given = next((n for part in field.metadata if (n := getattr(part, "name", None))), name)
        word = given.replace("_", "-")
        flags |= {f"--{word}": field.annotation is bool}
        flags |= {f"--no-{word}": True} if field.annotation is bool else {}
    return flags


def given_flags(argv: Sequence[str]) -> dict[str, str]:
    """Each flag of a command line with its words; what follows a bare `--` is not ours."""
    given: dict[str, list[str]] = {}
    flag = ""
    for word in before_separator(argv):
        if word.startswith("--"):
            flag, _, value = normal(word), *word.partition("=")[1:]
            given[flag] = [value] if value else []
        elif flag:
            given[flag].append(word)
    return {flag: ",".join(values) for flag, values in given.items()}


def before_separator(argv: Sequence[str]) -> Iterator[str]:
    """The words before a bare `--`."""
    for word in argv:
        if word == "--":
            return
        yield word


def modernize(argv: Sequence[str]) -> list[str]:
    """Flags under their names of today."""
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag in ALIASES:
            words += [*ALIASES[flag], *([value] if equals else [])]
        else:
            words.append(word)
    return words


def check_flags(
    argv: Sequence[str], known: Mapping[str, bool], prog: str, theirs: Mapping[str, str]
) -> None:
    """UserError for the first flag that is not `known`; `theirs` says what others are here."""
    for word in before_separator(argv):
        if word.startswith("--") and normal(word) not in {*known, "--help"}:
            refuse(word, argv, known, prog, theirs)


def refuse(
    word: str,
    argv: Sequence[str],
    known: Mapping[str, bool],
    prog: str,
    theirs: Mapping[str, str],
) -> NoReturn:
    """UserError for a word that no flag takes."""
    words = [part for given in argv for part in given.split("=", 1)]
    before = words[max(words.index(word) - 1, 0)].replace("_", "-") if word in words else ""
    flag = normal(word)
    # A switch with a value comes as two words, or as one.
    switch, value = (before, word) if known.get(before) else (flag, word.partition("=")[2])
    if known.get(switch) and not (value == word and word.startswith("-")):
        name = switch.removeprefix("--no-").removeprefix("--")
        raise UserError(f"{switch}={value}: takes no value; use --{name} or --no-{name}")
    here = {normal(name): (name, words) for name, words in theirs.items()}.get(flag)
    if here:
        name, words_here = here
        raise UserError(f"{word}: unknown flag; MAE's {name} is {words_here} here")
    if not word.startswith("-"):
        raise UserError(f"{word}: unknown word; flags begin with --, see {prog} --help")
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"see {prog} --help"
    raise UserError(f"{word}: unknown flag; {hint}")
