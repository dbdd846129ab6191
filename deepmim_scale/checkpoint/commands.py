"""Command line of checkpoints: `deepmim-scale verify CHECKPOINT`."""

from __future__ import annotations

import tyro

from deepmim_scale.config import Frozen


class VerifyArguments(Frozen):
    """Compare every file of a checkpoint, or of all checkpoints of a run, with its SHA-256."""

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, or one of its checkpoints/step_* folders."""


def run(arguments: VerifyArguments) -> None:
    """Print a line per intact checkpoint; ConfigError names a damaged file."""
    from deepmim_scale.checkpoint.files import verify

    for line in verify(arguments.checkpoint):
        print(line)
