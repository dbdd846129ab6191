"""Command line of the pictures: `deepmim-scale analyse reconstruct|losses RUN`."""

from __future__ import annotations

from pathlib import Path

import tyro

from deepmim_scale.config import Frozen


class ReconstructArguments(Frozen):
    """Draw held-out images, masked and filled in by each decoder, and print their errors."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    data: str = ""
    """Image folder with a held-out part (default: the run's)."""
    output: str = ""
    """Folder for reconstructions.png (default: the run's)."""


class LossesArguments(Frozen):
    """Draw each decoder's loss over the steps of a run."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    output: str = ""
    """Folder for losses.png (default: the run's)."""


def _picture(output: str, run: str, name: str) -> Path:
    path = Path(output or run) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run_reconstruct(arguments: ReconstructArguments) -> None:
    """Write reconstructions.png and print each decoder's held-out error."""
    from deepmim_scale.train.run_folder import load_run_config

    config = load_run_config(arguments.run)
    from deepmim_scale.analysis import reconstruct
    from deepmim_scale.evaluate.features import load_model

    model = load_model(arguments.run)
    manifest, batches = reconstruct.held_out(config, arguments.data or config.data)
    errors = reconstruct.held_out_errors(model, batches)
    print(f"held-out masked mean squared error ({len(manifest)} images, normalised pixels)")
    for name, value in errors.items():
        share = value / errors[reconstruct.GUESS]
        print(f"  {name:14s} {value:.4f}  {share:5.2f} of guessing the visible patches' mean")
    path = _picture(arguments.output, arguments.run, "reconstructions.png")
    reconstruct.draw(model, reconstruct.examples(manifest, batches), path)
    print(f"wrote {path}")


def run_losses(arguments: LossesArguments) -> None:
    """Write losses.png and print how far each decoder's loss fell."""
    from deepmim_scale.analysis.losses import draw, falls
    from deepmim_scale.train.run_folder import load_run_config, read_metrics

    load_run_config(arguments.run)
    rows = read_metrics(arguments.run)
    print("loss, mean of the first and of the last tenth of the steps")
    for name, (first, last) in falls(rows).items():
        print(f"  {name:10s} {first:.4f} -> {last:.4f}  ({last / first:.2f})")
    path = _picture(arguments.output, arguments.run, "losses.png")
    draw(rows, path)
    print(f"wrote {path}")
