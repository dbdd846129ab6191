"""Checkpoint folders on disk: atomic, checked by SHA-256, safetensors and JSON only.

RUN/checkpoints/step_00000800/ holds weights_stage00.safetensors and optimizer_stage00.safetensors
for each stage, and state.json with the step, the run's numbers and the digest of every file.
Tensors carry global names (blocks.17..., decoders.block06...), so any other number of stages reads
them. A folder without state.json was never finished: it keeps its `.part` name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepmim_scale.errors import UserError

FORMAT = 1
STATE = "state.json"


def step_folder(run: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return Path(run) / "checkpoints" / f"step_{step:08d}"


def part_folder(final: Path) -> Path:
    """Where a checkpoint is written before it takes its final name."""
    return final.with_name(final.name + ".part")


def begin_checkpoint(final: Path) -> None:
    """Make an empty part folder; leftovers of a killed save are removed."""
    part = part_folder(final)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """One safetensors file with `metadata` in its header, on disk when this returns its digest."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    _sync(path)
    return _digest(path)


def commit_checkpoint(final: Path, state: dict[str, Any], digests: dict[str, str]) -> None:
    """Write state.json with its files' digests, then rename the part folder to its final name."""
    part = part_folder(final)
    content = {"format": FORMAT, **state, "sha256": digests}
    (part / STATE).write_text(json.dumps(content, indent=1) + "\n")
    _sync(part / STATE)
    _sync(part)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _sync(final.parent)


def prune(run: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for folder in list_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def list_checkpoints(run: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(
        folder for folder in (Path(run) / "checkpoints").glob("step_????????") if folder.is_dir()
    )


def integrity_error(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every digest agrees."""
    try:
        state = json.loads((folder / STATE).read_text())
        digests = state["sha256"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder / STATE}: unreadable ({type(error).__name__})"
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: missing"
        if _digest(file) != digest:
            return f"{file}: damaged (SHA-256 differs from {STATE})"
    return None


def latest_intact(run: str | Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run, and what was wrong with newer ones."""
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        found = integrity_error(folder)
        if found is None:
            return folder, problems
        problems.append(found)
    return None, problems


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from itself or from its run (then the newest intact one)."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    folder, problems = latest_intact(path)
    if folder is None:
        found = problems[0] if problems else f"no checkpoints/step_* in {path}"
        raise UserError(f"{path}: no usable checkpoint ({found})")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The content of state.json."""
    return json.loads((folder / STATE).read_text())


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


def verify(path: str | Path) -> Iterator[str]:
    """A line on the checkpoint or on each of a run's; at the end UserError if any is damaged."""
    path = Path(path)
    run = path.parent if path.name == "checkpoints" else path
    folders = [path] if (path / STATE).is_file() else list_checkpoints(run)
    if not folders:
        raise UserError(f"{path}: no checkpoint; give a run or a checkpoints/step_* folder")
    damaged = 0
    for folder in folders:
        found = integrity_error(folder)
        damaged += found is not None
        yield found or f"{folder}: intact, step {read_state(folder)['step']}"
    if damaged:
        raise UserError(
            f"{path}: {damaged} of {len(folders)} checkpoints damaged; delete what is damaged, a "
            "run goes on from its newest intact checkpoint or, if none is left, from the start"
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
