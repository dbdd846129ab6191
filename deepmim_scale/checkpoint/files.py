"""Checkpoint folders on disk: atomic, checked by SHA-256, safetensors and JSON only.

RUN/checkpoints/step_00000800/ holds weights_stage00.safetensors and optimizer_stage00.safetensors
for each stage, and state.json with the step, the run's numbers and the digest of every file.
state.json.sha256 holds the digest of state.json, so that no byte is without one. Tensors carry
global names (blocks.17..., decoders.block06...), so any other number of stages reads them. A folder
without state.json was never finished: it keeps its `.part` name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.runs.folder import (
    CHECKPOINTS,
    list_checkpoints,
    named_checkpoint,
    step_of,
)
from deepmim_scale.runs.state import STATE, CheckpointState, describe_problem, read_state
from deepmim_scale.settings import pluralize

DIGEST = f"{STATE}.sha256"
# Weights that a fine-tuned run publishes.
BEST, LAST = "best.safetensors", "last.safetensors"


disk_is_full = False
"""Whether no tensors can be written, as the fault enospc wants it."""


def part_folder(final: Path) -> Path:
    """Where a checkpoint is written before it takes its final name."""
    return final.with_name(final.name + ".part")


def begin_checkpoint(final: Path) -> None:
    """Make an empty part folder in a run's folder; leftovers of a killed save are removed."""
    part = part_folder(final)
    drop_part(final)
    # Not its parents: a run's folder that vanished is told, not made again.
    part.parent.mkdir(exist_ok=True)
    part.mkdir()


def drop_part(final: Path) -> None:
    """Remove what an unfinished save has left."""
    shutil.rmtree(part_folder(final), ignore_errors=True)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """One safetensors file with `metadata` in its header, on disk when this returns its digest."""
    if disk_is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    _sync(path)
    return _digest(path)


def commit_checkpoint(final: Path, state: CheckpointState) -> None:
    """Write state.json and its digest, then rename the part folder to its final name."""
    part = part_folder(final)
    (part / STATE).write_text(state.model_dump_json(indent=1) + "\n")
    (part / DIGEST).write_bytes(_digest_line(part))
    for path in (part / STATE, part / DIGEST, part):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _sync(final.parent)


def prune(run: str | Path, keep: int, every: int = 0) -> None:
    """Delete all checkpoints but the newest `keep` and those at multiples of `every` steps."""
    for folder in list_checkpoints(run)[:-keep]:
        step = step_of(folder)
        assert step is not None, "list_checkpoints gives folders of steps"
        if not every or step % every:
            shutil.rmtree(folder)


def integrity_error(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every digest agrees.

    UserError for a checkpoint of a newer format.
    """
    digest_file = folder / DIGEST
    try:
        if digest_file.is_file() and digest_file.read_bytes() != _digest_line(folder):
            return f"{folder / STATE}: damaged (SHA-256 differs from {DIGEST})"
        state = read_state(folder)
    except RunFailure as error:
        return str(error)
    except OSError as error:
        return f"{folder / STATE}: {describe_problem(error)}"
    # Only the first format had no digest of state.json.
    if state.format > 1 and not digest_file.is_file():
        return f"{digest_file}: missing"
    for name, digest in state.sha256.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: missing"
        if _digest(file) != digest:
            return f"{file}: damaged (SHA-256 differs from {STATE})"
    return None


def _digest_line(folder: Path) -> bytes:
    """The whole content of a state's digest file, as `sha256sum -c` reads it."""
    return f"{_digest(folder / STATE)}  {STATE}\n".encode()


def latest_intact(run: str | Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run, and what was wrong with newer ones."""
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        found = integrity_error(folder)
        if found is None:
            return folder, problems
        problems.append(found)
    return None, problems


def resolve(path: str | Path, from_step: str = "") -> Path:
    """The intact checkpoint that a run and `--from` name, or a checkpoint's own folder.

    Without a step it is the newest intact one, with a warning for each damaged one. UserError if
    there is none of that name, RunFailure if it is damaged.
    """
    path = Path(path)
    named = _named(path, from_step)
    if named is not None:
        found = integrity_error(named)
        if found:
            raise RunFailure(f"{found}; choose another checkpoint with --from")
        return named
    folder, problems = latest_intact(path)
    if folder is None and problems:
        raise RunFailure(f"{path}: no checkpoint is intact ({problems[0]}); train again")
    if folder is None:
        raise UserError(f"{path}: no checkpoints/step_* in it; give the folder of a run that saved")
    for problem in problems:
        print(f"warning: {problem}; using {folder.name}", file=sys.stderr)
    return folder


def _named(path: Path, from_step: str) -> Path | None:
    """The one checkpoint that a command line names; None if it names a whole run."""
    is_checkpoint = path.is_dir() and (step_of(path) is not None or (path / STATE).is_file())
    if is_checkpoint and from_step:
        raise UserError(f"from={from_step}: {path} is one checkpoint; give its run's folder")
    if is_checkpoint:
        return path
    return named_checkpoint(path, from_step) if from_step not in ("", "latest") else None


def tensor_names(folder: Path, kind: str) -> set[str]:
    """Names of all tensors in the stages' `kind` files."""
    found: set[str] = set()
    for file in folder.glob(f"{kind}_stage*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


def read_tensors(folder: Path, kind: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of all stages' `kind` files ("weights", "optimizer"); all of them without `names`.

    ValueError names the first tensor that no stage saved.
    """
    wanted = None if names is None else set(names)
    result: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{kind}_stage*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys() if wanted is None else wanted & set(tensors.keys()):
                result[name] = tensors.get_tensor(name)
    missing = sorted((wanted or set()) - set(result))
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is in no {kind} file")
    return result


def verify(path: str | Path, from_step: str = "") -> Iterator[str]:
    """A line on the checkpoint or on each of a run's; at the end RunFailure if one is damaged."""
    path = Path(path)
    run = path.parent if path.name == CHECKPOINTS else path
    named = _named(run, from_step)
    folders = list_checkpoints(run) if named is None else [named]
    if from_step:
        folders = folders[-1:]
    if not folders:
        raise UserError(f"{path}: no checkpoint; give a run or a checkpoints/step_* folder")
    damaged = 0
    for folder in folders:
        found = integrity_error(folder)
        damaged += found is not None
        yield found or f"{folder}: intact, step {read_state(folder).step}"
    if damaged:
        raise RunFailure(
            f"{path}: {damaged} of {pluralize(len(folders), 'checkpoint')} damaged; delete what is "
            "damaged, a run goes on from its newest intact checkpoint or, if none is left, from "
            "the start"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
