"""The quickstart's fine-tuning: 100 labelled digits, the pre-trained encoder against none.

Labels are drawn from the even digits, which pre-training saw without labels; the 898 odd ones are
counted. Both networks train for the same few updates.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.config import FromStep, RunConfig
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.runs.folder import load_run_config, read_metrics
from deepmim_scale.settings import Folder, FrozenConfig, PositiveInt

if TYPE_CHECKING:
    from deepmim_scale.data.samples import LabelledDigits

BATCH = 32
EVALUATIONS = 5
# What suits so few and small images; both kinds of network share it.
_SHARED = {
    "microbatch_size": BATCH,
    "global_batch": BATCH,
    "mixup": 0,
    "cutmix": 0,
    "auto_augment": "",
    "erase": 0,
    "flip": 0,
    "min_crop": 0.6,
    "crop_share": 1,
    "loader_workers": 0,
    "save_every": 0,
}
# Peak rates 3e-3 and 1e-3; each kind has what served it best.
PRETRAINED = {"blr": 3e-3 * 256 / BATCH, "layer_decay": 0.9, "drop_path": 0.1}
SCRATCH = {"blr": 1e-3 * 256 / BATCH, "layer_decay": 1, "drop_path": 0}
_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


class DigitsFinetuneArguments(FrozenConfig):
    """Fine-tune a run's encoder on 100 labelled digits, beside the same network from scratch."""

    run: tyro.conf.Positional[str]
    """Folder of a run with 32-pixel input."""
    from_step: FromStep = ""
    """The checkpoint, as step_00000800 or 800 (default: the newest intact one)."""
    output: Folder = "runs/finetune"
    """Folder for the runs, summary.json and accuracy.png."""
    labels: PositiveInt = 100
    """Labelled digits of a draw."""
    draws: PositiveInt = 3
    """Draws of the labelled digits."""
    steps: PositiveInt = 200
    """Updates of every run."""
    at_once: PositiveInt = 2
    """Runs at once, a process each."""


def run_digits_finetune(arguments: DigitsFinetuneArguments) -> None:
    """Run all of it; what is finished in the output folder is not repeated."""
    config = load_run_config(arguments.run)
    if config.model.img_size != 32:
        raise UserError(f"run={arguments.run}: img_size is {config.model.img_size}; digits are 32")
    output = Path(arguments.output)
    summary_file = writable("output", output / "summary.json")
    from deepmim_scale.data.samples import labelled_digits

    training, testing = labelled_digits("train"), labelled_digits("val")
    if not 20 <= arguments.labels <= len(training.labels):
        raise UserError(f"labels={arguments.labels}: must be from 20 to {len(training.labels)}")
    chosen = [
        np.random.RandomState(draw).permutation(len(training.labels))[: arguments.labels]
        for draw in range(arguments.draws)
    ]
    for draw, ids in enumerate(chosen):
        training.write(output / f"digits{draw}" / "train", ids)
        testing.write(output / f"digits{draw}" / "val", np.arange(len(testing.labels)))
    names = [(kind, draw) for draw in range(arguments.draws) for kind in ("pretrained", "scratch")]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        jobs = [pool.submit(_finetune, arguments, config, *name) for name in names]
        curves = {name: job.result() for name, job in zip(names, jobs, strict=True)}
    pixels = [_raw_pixels(training, ids, testing) for ids in chosen]
    rows = {
        kind: [curves[kind, draw][-1][1] for draw in range(arguments.draws)]
        for kind in ("pretrained", "scratch")
    } | {"raw_pixels": pixels}
    summary = {kind: {"mean": float(np.mean(row)), "draws": row} for kind, row in rows.items()}
    summary_file.write_text(json.dumps(summary, indent=1) + "\n")
    _draw(curves, float(np.mean(pixels)), arguments, output / "accuracy.png")
    print(
        f"digits, {arguments.labels} labels, {arguments.steps} updates, {arguments.draws} draws, "
        f"accuracy in % on {len(testing.labels)} others"
    )
    for kind, title in (
        ("pretrained", "pre-trained encoder"),
        ("scratch", "from scratch"),
        ("raw_pixels", "raw pixels, logistic regression"),
    ):
        draws = ", ".join(f"{value:.1f}" for value in rows[kind])
        print(f"{title}: {np.mean(rows[kind]):.1f} ({draws})")
    print("this compares equal, few updates; with more of them the difference shrinks")
    print(f"wrote {summary_file} and {output / 'accuracy.png'}")


def _finetune(
    arguments: DigitsFinetuneArguments, config: RunConfig, kind: str, draw: int
) -> list[tuple[int, float]]:
    """One run in a process of its own; (updates, accuracy in %) of its evaluations."""
    output = Path(arguments.output) / f"{kind}{draw}"
    steps_per_epoch = arguments.labels // BATCH or 1
    batch = min(BATCH, arguments.labels)
    own = PRETRAINED if kind == "pretrained" else SCRATCH
    flags = _SHARED | own | {"microbatch_size": batch, "global_batch": batch}
    flags |= {
        "data": Path(arguments.output) / f"digits{draw}",
        "output": output,
        "seed": draw,
        "steps": arguments.steps,
        "warmup_epochs": 0.1 * arguments.steps / steps_per_epoch,
        "validate_every": max(arguments.steps // EVALUATIONS, 1) / steps_per_epoch,
    }
    words: list[str] = []
    if kind == "pretrained":
        words = [arguments.run]
        flags |= {"from": arguments.from_step} if arguments.from_step else {}
    else:
        flags |= {name: getattr(config.model, name) for name in _SIZES}
    words += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "deepmim_scale.cli", "finetune", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RunFailure(f"{output}: {told.removeprefix('error: ')}")
    rows = [row for row in read_metrics(output) if "accuracy" in row]
    return [(row["step"], row["accuracy"]) for row in rows]


def _raw_pixels(training: LabelledDigits, ids: np.ndarray, testing: LabelledDigits) -> float:
    """Accuracy in % of logistic regression on the pixels of the labelled digits."""
    from deepmim_scale.evaluate.probes import linear

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) / 255

    labels = training.labels[ids]
    found = linear(flat(training.images[ids]), labels, flat(testing.images), testing.labels)
    return 100 * found


def _draw(
    curves: dict[tuple[str, int], list[tuple[int, float]]],
    pixels: float,
    arguments: DigitsFinetuneArguments,
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (kind, title) in enumerate(
        {"pretrained": "pre-trained encoder", "scratch": "from scratch"}.items()
    ):
        runs = np.array([curve for (name, _), curve in curves.items() if name == kind], float)
        steps, color = runs[0, :, 0], f"C{number}"
        axes.plot(steps, runs[:, :, 1].mean(0), "o-", color=color, markersize=4, label=title)
        for run in runs:
            axes.plot(steps, run[:, 1], color=color, linewidth=0.6, alpha=0.6)
    title = "raw pixels, logistic regression"
    axes.axhline(pixels, color="0.4", linestyle="--", linewidth=1, label=title)
    axes.set(xlabel=f"updates of {BATCH} images", ylabel="accuracy, %", ylim=(0, 100))
    axes.set_title(
        f"{arguments.labels} labelled digits, mean and each of {arguments.draws} draws", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
