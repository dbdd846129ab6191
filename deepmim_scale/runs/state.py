"""What a checkpoint says about itself: the content of its state.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from deepmim_scale.errors import RunFailure, UserError

STATE = "state.json"
# 1: state.json had no digest; 2: state.json.sha256 lies beside it.
FORMAT = 2


class CheckpointState(BaseModel):
    """The place of a checkpoint in its run, and the digest of each of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    """Layout of the checkpoint's folder."""
    step: int
    """Optimizer steps taken."""
    updates: int
    """Those of them that changed the weights: a step without finite gradients does not."""
    total_steps: int
    """Length of the run, steps."""
    global_batch: int
    """G, images per step."""
    manifest_sha: str
    """Digest of the training images' list."""
    precision: str
    """What the matrix products were computed in."""
    num_stages: int
    """P, stages that wrote the files; any other number reads them."""
    loss_scaler: dict[str, int | float] = {}
    """State of float16's loss scale; empty otherwise."""
    sha256: dict[str, str] = {}
    """File name -> digest."""


def read_state(folder: Path) -> CheckpointState:
    """The state of a checkpoint of this format or an older one.

    UserError for a newer format, RunFailure for a file that cannot be understood.
    """
    path = folder / STATE
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version = content["format"]
        # First: a newer format may have any fields.
        if version > FORMAT:
            raise UserError(
                f"{path}: has format {version}, this deepmim_scale reads up to {FORMAT}; "
                "use a newer deepmim_scale"
            )
        return CheckpointState.model_validate(content)
    except UserError:  # also a ValueError
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFailure(f"{path}: {describe_problem(error)}") from None


def describe_problem(error: Exception) -> str:
    """Why a state.json cannot be understood, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"unreadable ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    return f"unreadable ({type(error).__name__})"
