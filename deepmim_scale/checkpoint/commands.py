"""Command line of checkpoints: `deepmim-scale verify CHECKPOINT | export RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.config import FromStep
from deepmim_scale.errors import UserError
from deepmim_scale.settings import FrozenConfig


class VerifyArguments(FrozenConfig):
    """Compare every file of a checkpoint, or of all checkpoints of a run, with its SHA-256."""

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, or one of its checkpoints/step_* folders."""
    from_step: FromStep = ""
    """Only this checkpoint of the run, as step_00000800, 800 or latest."""


def run(arguments: VerifyArguments) -> None:
    """Print a line per checkpoint; RunFailure at the end if any is damaged."""
    from deepmim_scale.checkpoint.files import verify

    for line in verify(arguments.checkpoint, arguments.from_step):
        print(line)


class ExportArguments(FrozenConfig):
    """Write a run's weights for timm, Hugging Face transformers, or the official code."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    output: str
    """New .safetensors file; for hf, beit, vitdet FOLDER/model.safetensors, beside config.json."""
    from_step: FromStep = ""
    """The checkpoint, as step_00000800 or 800 (default: the newest intact one)."""
    format: Literal["timm", "hf", "mae", "beit", "vitdet"] = "timm"
    """timm: encoder; hf: encoder, for MAE also the decoder; mae: everything, official names; beit,
    vitdet: backbones of transformers for segmentation and detection."""


def run_export(arguments: ExportArguments) -> None:
    """Write the file and print how to load it; nothing is overwritten."""
    from deepmim_scale.runs.folder import load_run_config

    output = Path(arguments.output)
    new = [output]
    if output.suffix != ".safetensors":
        raise UserError(f"output={output}: must be a file that ends in .safetensors")
    if arguments.format in ("hf", "beit", "vitdet"):
        new.append(output.with_name("config.json"))
        if output.name != "model.safetensors":
            raise UserError(
                f"output={output}: transformers looks for model.safetensors; name the file so"
            )
    for path in new:
        if path.exists():
            raise UserError(f"output={path}: exists; delete it or choose another --output")
    load_run_config(arguments.run)
    writable("output", output)
    from deepmim_scale.checkpoint.backbones import BACKBONES, check_transformers
    from deepmim_scale.checkpoint.export import export

    if arguments.format in BACKBONES:
        check_transformers(arguments.format)
    for line in export(arguments.run, arguments.format, output, arguments.from_step):
        print(line)
