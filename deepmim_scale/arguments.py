"""From the command line to a checked RunConfig; users' mistakes become one line. No torch here."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.methods import METHODS
from deepmim_scale.objectives import HYBRID
from deepmim_scale.presets import PRESETS, load_preset
from deepmim_scale.settings import FrozenConfig

ALIASES = {"--loss": ["--target"], "--hybrid": ["--target", HYBRID, "--teacher"]}

Arguments = TypeVar("Arguments", bound=FrozenConfig)


def _parser_message(output: str) -> str:
    """The sentence inside the box that tyro draws around an error."""
    body: list[str] = []
    for line in output.strip().splitlines()[1:]:  # the first line is the title
        is_rule = re.search("[-\u2500]{4}", line) is not None
        if is_rule and body:
            break
        if not is_rule:
            body.append(line.strip("|\u2502 "))
    text = re.sub(r"\s+", " ", " ".join(body)).strip()
    ours = re.search(r"Value error, (.*?) \[type=value_error", text)  # raised by a config's check
    # A message of ours that begins with key=value needs no flag before it.
    return ours[1] if ours else re.sub(r"^Error parsing (--[\w-]+: (?=\w+=))?", "", text)


def _flags(config_class: type[FrozenConfig]) -> dict[str, bool]:
    """Every flag there is, and whether it is a switch, which takes no value."""
    flags: dict[str, bool] = {}
    for name, field in config_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, FrozenConfig):
            flags |= _flags(field.annotation)
        else:
            word = name.replace("_", "-")
            flags |= {f"--{word}": field.annotation is bool}
            flags |= {f"--no-{word}": True} if field.annotation is bool else {}
    return flags


def _refuse(word: str, argv: Sequence[str], flags: dict[str, bool], prog: str) -> NoReturn:
    """UserError for a word that no flag takes."""
    words = [part for given in argv for part in given.split("=", 1)]
    before = words[max(words.index(word) - 1, 0)].replace("_", "-") if word in words else ""
    if flags.get(before) and not word.startswith("-"):
        name = before.removeprefix("--no-").removeprefix("--")
        raise UserError(f"{before}={word}: takes no value; use --{name} or --no-{name}")
    flag = word.split("=")[0].replace("_", "-")
    near = difflib.get_close_matches(flag, flags, n=1)
    hint = f"did you mean {near[0]}?" if near else f"see {prog} --help"
    raise UserError(f"{word}: unknown flag; {hint}")


def parse(
    config_class: type[Arguments], argv: Sequence[str], *, prog: str, default: Any = None
) -> Arguments:
    """Arguments of `config_class`, with `-` and `_` alike; UserError for a user's mistake."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config, unknown = tyro.cli(
                config_class,
                args=list(argv),
                prog=prog,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_parser_message(captured.getvalue())) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if unknown:
        _refuse(unknown[0], argv, _flags(config_class), prog)
    return config


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file; UserError with line and column."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{path}: no valid JSON at {where}: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: must hold a JSON object, as {{"key": value}}')
    return content


def writable(key: str, path: str | Path) -> Path:
    """The file `path` that a command will write, its folder made; UserError if it cannot be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Trying is the only sure answer; a file that is not there yet is not begun.
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{key}={path}: cannot be written ({reason}); choose another") from None
    return path


def parse_run(argv: Sequence[str], *, prog: str) -> RunConfig:
    """The run that a pre-training command line asks for: preset or saved config, then flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--local_rank", "--local-rank", help="given by the deepspeed launcher")
    try:
        start, rest = first.parse_known_args(_modern(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    helping = any(word in ("-h", "--help") for word in rest)
    words = {word.split("=")[0].replace("_", "-") for word in rest}
    if start.config and start.preset:
        raise UserError(
            f"config={start.config}: is a whole run and takes no preset={start.preset}; "
            "give one of the two"
        )
    if start.config:
        saved = read_json(start.config)
        default = RunConfig.load(saved)
    elif start.preset or helping:
        default = load_preset(start.preset or "quickstart")
    else:
        flags = _flags(RunConfig) | {"--config": False}
        for word in rest:
            if word.startswith("--") and word.split("=")[0].replace("_", "-") not in flags:
                _refuse(word, rest, flags, prog)
        raise UserError(f"preset: missing; give --preset with one of {', '.join(PRESETS)}")
    if "--microbatches" in words and "--global-batch" not in words:
        default = default.replace(global_batch=None)
    if "--epochs" in words and "--steps" not in words:
        default = default.replace(steps=None)
    if "--taps" not in words and _taps_follow(default.model.method, rest, words):
        # A preset carries its taps filled in; they are spread again for another depth or method.
        rest = [*rest, "--taps", "even"]
    config = parse(RunConfig, rest, prog=prog, default=default)
    return config.replace(output=config.output or f"runs/{config.preset}")


def _taps_follow(method: str, rest: Sequence[str], words: set[str]) -> bool:
    """Whether the preset's taps are not the user's any more."""
    if "--method" in words:
        return True
    return bool(words & {"--depth", "--num-segments"}) and not METHODS[method].free_taps


def _modern(argv: Sequence[str]) -> list[str]:
    """Flags under their names of today: `--loss` is a target, `--hybrid RUN` a target's teacher."""
    words: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag in ALIASES:
            words += [*ALIASES[flag], *([value] if equals else [])]
        else:
            words.append(word)
    return words


def difference(config: RunConfig) -> list[str]:
    """What was set beside the run's preset, as `key=value` words."""

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != "model"} | values["model"]

    start = load_preset(config.preset) if config.preset else RunConfig()
    ours, base = flat(config.model_dump()), flat(start.model_dump())
    return [f"{key}={value}" for key, value in ours.items() if value not in (None, base[key])]


def is_main_process() -> bool:
    """Whether this process prints: local rank 0 under a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def run_command(command: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and exit code 2."""
    try:
        command()
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailure as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if is_main_process():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
