"""From the command line to a checked RunConfig; users' mistakes become one line. No torch here."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import STOPPED, RunFailure, Stopped, UserError
from deepmim_scale.flags import (
    MAE_FLAGS,
    check_flags,
    flags_of,
    given_flags,
    modernize,
    normal,
    refuse,
)
from deepmim_scale.json_file import read_json
from deepmim_scale.methods import METHODS
from deepmim_scale.presets import PRESETS, load_preset
from deepmim_scale.settings import File, FrozenConfig, shown_as

Arguments = TypeVar("Arguments", bound=FrozenConfig)

# What tyro says, in the words of settings.py; VALUE is the flag's as it was typed.
_TRANSLATIONS = (
    (r"Error parsing (--[\w-]+): .*int\(\)", "must be a whole number"),
    (r"Error parsing (--[\w-]+): .*to float", "must be a number"),
    (r"Error parsing (--[\w-]+): Could not find valid parse", "must be a number, or several"),
    (r"invalid choice .* for argument '(--[\w-]+)'\. Expected one of \((.*)\)", "must be one of "),
)


def _complaint(
    stop: SystemExit, output: str, argv: Sequence[str], config_class: type[FrozenConfig]
) -> str:
    """What was wrong: our own exception behind tyro's exit, or else what the box it drew says."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        error = error.__context__
    text = _boxed(output)
    for pattern, rule in _TRANSLATIONS:
        found = re.search(pattern, text)
        if found:
            flag, *choices = found.groups()
            value = given_flags(argv).get(flag, "")
            rule += ", ".join(re.findall("'(.*?)'", choices[0])) if choices else ""
            return f"{flag.strip('-').replace('-', '_')}={value}: {rule}"
    without = re.search(r"Missing value for argument '(--[\w-]+)", text)
    if without:
        return f"{without[1]}: needs a value; give one after it"
    missing = re.match(r"Missing from [\w -]+: (--[\w-]+)?", text)
    if not missing:
        return text
    if missing[1]:
        return f"{missing[1].strip('-').replace('-', '_')}: missing; give {missing[1]}"
    fields = config_class.model_fields.items()
    first = next(name for name, field in fields if field.is_required())
    return f"{first}: missing; give it behind the command"


def _boxed(output: str) -> str:
    """The sentence inside the box that tyro draws around an error."""
    body: list[str] = []
    for line in output.strip().splitlines()[1:]:  # the first line is the title
        is_rule = re.search("[-\u2500]{4}", line) is not None
        if is_rule and body:
            break
        if not is_rule:
            body.append(line.strip("|\u2502 "))
    return re.sub(r"\s+", " ", " ".join(body)).strip()


def parse(
    config_class: type[Arguments],
    argv: Sequence[str],
    *,
    prog: str,
    default: Any = None,
    theirs: Mapping[str, str] | None = None,
) -> Arguments:
    """Arguments of `config_class`, with `-` and `_` alike; UserError for a user's mistake.

    `theirs` are flags of other programs, with what they are here. Arguments with a model begin with
    their preset's.
    """
    known = flags_of(config_class)
    check_flags(argv, known, prog, theirs or {})
    given = given_flags(argv)
    if default is None and "model" in config_class.model_fields and "--preset" in given:
        preset = load_preset(given["--preset"])
        default = config_class(preset=given["--preset"], model=preset.model)
        argv = [*argv, *_taps_that_follow(preset.model.method, given)]
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
        raise UserError(_complaint(stop, captured.getvalue(), argv, config_class)) from None
    if unknown:
        refuse(unknown[0], argv, known, prog, theirs or {})
    return config


@contextlib.contextmanager
def _of_file(path: str | Path) -> Iterator[None]:
    """Name the file in a UserError about what it holds."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_run(path: str | Path) -> RunConfig:
    """The run that a config.json describes; UserError names the file and the key."""
    values = read_json(path)
    with _of_file(path):
        config = RunConfig.load(values)
        if config.preset:
            load_preset(config.preset)
    return config


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


class _HelpedRun(RunConfig):
    """One pre-training run."""

    preset: Annotated[str, shown_as("NAME", f"Start from one of: {', '.join(PRESETS)}.")] = ""
    config: File = ""
    """Start from a run's config.json instead of a preset; flags change what it says."""


def parse_run(argv: Sequence[str], *, prog: str) -> RunConfig:
    """The run that a pre-training command line asks for: preset or saved config, then flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--local_rank", "--local-rank", help="given by the deepspeed launcher")
    try:
        start, rest = first.parse_known_args(modernize(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: needs a value; give one after it") from None
    given = given_flags(rest)
    if start.config and start.preset:
        raise UserError(
            f"config={start.config}: is a whole run and takes no preset={start.preset}; "
            "give one of the two"
        )
    if start.config:
        default = load_run(start.config)
    else:
        default = load_preset(start.preset) if start.preset else RunConfig()
    if "--help" in given or "-h" in rest:
        values = dict(default) | {"config": start.config or ""}
        parse(_HelpedRun, ["--help"], prog=prog, default=_HelpedRun(**values))
    check_flags(rest, flags_of(_HelpedRun), prog, MAE_FLAGS)
    if not (start.config or start.preset):
        raise UserError(f"preset: missing; give --preset with one of {', '.join(PRESETS)}")
    if "--steps" in given and "--epochs" in given:
        raise UserError(
            f"steps={given['--steps']}: is a length, as epochs={given['--epochs']} is; "
            "give one of the two"
        )
    if "--microbatches" in given and "--global-batch" not in given:
        default = default.replace(global_batch=None)
    if "--epochs" in given:
        default = default.replace(steps=None)
    rest = [*rest, *_taps_that_follow(default.model.method, given)]
    try:
        config = parse(RunConfig, rest, prog=prog, default=default, theirs=MAE_FLAGS)
    except UserError as error:
        key = re.match(r"\w+(?==)", str(error))
        flag = f"--{key[0]}" if key else ""
        if flag in MAE_FLAGS:  # one that both have, with other values
            raise UserError(f"{error}; MAE's {flag} is {MAE_FLAGS[flag]} here") from None
        if start.config and flag and normal(flag) not in given:
            raise UserError(f"{start.config}: {error}") from None
        raise
    name = config.preset or Path(start.config or "run").stem
    return config.replace(output=config.output or f"runs/{name}")


def _taps_that_follow(method: str, given: Mapping[str, str]) -> list[str]:
    """Flags that spread taps again: a preset has them filled in, for its own depth and method."""
    sizes = given.keys() & {"--depth", "--num-segments"}
    follow = "--method" in given or (sizes and not METHODS[method].free_taps)
    return ["--taps", "even"] if follow and "--taps" not in given else []


def difference(config: RunConfig) -> list[str]:
    """What was set beside the run's preset, as `key=value` words."""

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != "model"} | values["model"]

    start = load_preset(config.preset) if config.preset else RunConfig()
    ours, base = flat(config.model_dump()), flat(start.model_dump())
    return [f"{key}={value}" for key, value in ours.items() if value not in (None, base[key])]


def is_main_process() -> bool:
    """Whether this process is_main for its machine: local rank 0 under a launcher.

    Ask before processes are set up, which gives LOCAL_RANK the number of a GPU.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


SECONDS_TO_SPEAK = 3.0


def run_command(command: Callable[[], None]) -> None:
    """Run a command; UserError (exit code 2), RunFailure (1) and Stopped (75) become one line."""
    is_main = is_main_process()
    try:
        command()
    except (UserError, RunFailure) as error:
        if is_main:
            # A value may hold line breaks.
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            # A launcher ends all ranks with the first: the one that speaks must not be cut off.
            time.sleep(SECONDS_TO_SPEAK)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Stopped as stop:
        if is_main:
            with contextlib.suppress(OSError):  # whoever stopped it may read no more
                print(stop, flush=True)
        sys.exit(STOPPED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if is_main:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
