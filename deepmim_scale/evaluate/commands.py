"""Command line of the evaluations: `deepmim-scale evaluate digits|knn|linear RUN`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.config import FromStep
from deepmim_scale.errors import UserError
from deepmim_scale.settings import Folder, FrozenConfig, shown_as

if TYPE_CHECKING:
    from deepmim_scale.data.classes import Classes
    from deepmim_scale.evaluate.folder import Probe


class DigitsArguments(FrozenConfig):
    """Probe a run's features on scikit-learn's digits (100 labels, 5 draws)."""

    run: tyro.conf.Positional[str]
    """Folder of a run with 32-pixel input."""
    from_step: FromStep = ""
    """The checkpoint, as step_00000800 or 800 (default: the newest intact one)."""
    json_file: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the table (default RUN/digits.json)."""


class FolderArguments(FrozenConfig):
    """Probe a run's frozen features on the classes of an image folder."""

    run: tyro.conf.Positional[str]
    """A run, one of its checkpoints, or a file of weights as `finetune` takes it."""
    from_step: FromStep = ""
    """The checkpoint, as step_00000800 or 800 (default: the newest intact one)."""
    model: Annotated[str, shown_as("timm:NAME")] = ""
    """The timm network that a file of weights belongs to."""
    blocks: Annotated[tuple[int, ...], shown_as("INT ...")] = ()
    """Blocks to probe, from 1 (default: those that were tapped, or four evenly spread)."""
    data: Folder = ""
    """Folder with train/<class> and val/<class> (default: the run's)."""
    pool: tuple[Literal["class", "mean", "2x2"], ...] = ("class", "mean", "2x2")
    """How tokens become features: the class token, the patches' mean, the means of quarters."""
    json_file: Annotated[str, tyro.conf.arg(name="json")] = ""
    """Also write the accuracies to this file."""


class KnnArguments(FolderArguments):
    """Weighted k-NN on the classes of an image folder, by cosine as DINO evaluates."""

    k: int = 20
    """Neighbours that vote, with weights exp(cosine / 0.07)."""


class LinearArguments(FolderArguments):
    """Logistic regression on the classes of an image folder; for thousands of images."""


def run_digits(arguments: DigitsArguments) -> None:
    """Print the table with the best of each kind, and save it as JSON."""
    from deepmim_scale.runs.folder import load_run_config

    load_run_config(arguments.run)
    output = writable("json", arguments.json_file or Path(arguments.run) / "digits.json")
    from deepmim_scale.evaluate.digits import NUM_DRAWS, NUM_LABELS, probe_run, table

    rows = probe_run(arguments.run, arguments.from_step)
    print(f"digits, {NUM_LABELS} labels, {NUM_DRAWS} draws, accuracy in % (mean +- std)")
    print(table(rows))
    for encoder, title in (("-", "raw pixels"), ("untrained", "untrained"), ("trained", "trained")):
        best = max((row for row in rows if row.encoder == encoder), key=lambda row: row.mean)
        print(f"best {title}: {best.mean:.1f} ({best.features}, {best.pool}, {best.probe})")
    output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def run_knn(arguments: KnnArguments) -> None:
    """Print the table of k-NN accuracies."""
    from deepmim_scale.data.classes import open_classes
    from deepmim_scale.evaluate.probes import TEMPERATURE, knn_weighted

    data, cache = _data(arguments)
    classes, k = open_classes(data, cache), arguments.k
    if not 0 < k <= len(classes.labels):
        raise UserError(f"k={k}: must be from 1 to the {len(classes.labels)} training images")
    settings = {"probe": "knn", "k": k, "temperature": TEMPERATURE}
    _probe(arguments, classes, partial(knn_weighted, k=k), settings)


def run_linear(arguments: LinearArguments) -> None:
    """Print the table of the linear probe's accuracies."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("linear: scikit-learn is not installed; pip install scikit-learn")
    from deepmim_scale.data.classes import open_classes
    from deepmim_scale.evaluate.probes import FOLDS, linear

    data, cache = _data(arguments)
    classes = open_classes(data, cache)
    name, fewest = classes.fewest
    if fewest < FOLDS:
        raise UserError(
            f"data={data}: {fewest} training images of class {name}; the linear probe needs "
            f"{FOLDS} of each class to choose its regularization; use evaluate knn"
        )
    _probe(arguments, classes, partial(linear, num_splits=1), {"probe": "linear"})


def _data(arguments: FolderArguments) -> tuple[str, str]:
    """Data and cache: the arguments' or the run's."""
    if not arguments.pool:
        raise UserError("pool: names nothing; give one or more of class, mean, 2x2")
    if arguments.json_file:
        writable("json", arguments.json_file)
    return data_and_cache(arguments.run, arguments.data)


def data_and_cache(run: str, data: str) -> tuple[str, str]:
    """What is given, or the run's; UserError for a file or a folder without either."""
    from deepmim_scale.runs.folder import CHECKPOINTS, fine_tuned, load_run_config

    place = Path(run)
    folder = place.parents[1] if place.parent.name == CHECKPOINTS else place
    if place.is_dir() and not fine_tuned(folder):
        config = load_run_config(folder)
        return data or config.data, config.cache
    if not place.exists():
        raise UserError(f"{run}: does not exist; give a run or a file of weights")
    if not data:
        raise UserError(f"data: missing; {run} does not tell it, give --data")
    return data, ""


def _probe(
    arguments: FolderArguments, classes: Classes, probe: Probe, settings: dict[str, Any]
) -> None:
    from deepmim_scale.evaluate.features import PIXELS
    from deepmim_scale.evaluate.folder import probe_folder, table
    from deepmim_scale.evaluate.frozen import open_frozen

    trained, untrained = open_frozen(
        arguments.run, arguments.from_step, arguments.model, arguments.blocks
    )
    given = ", ".join(f"{key} {value}" for key, value in settings.items())
    sizes = f"{len(classes.labels)} training and {len(classes.expected)} validation images"
    print(f"{given}; {sizes}, {max(classes.labels) + 1} classes; accuracy in %")
    encoders = {"untrained": untrained, "trained": trained}
    accuracies = probe_folder(encoders, classes, probe, arguments.pool)
    print(table(accuracies, arguments.pool))
    print(f"raw pixels: {accuracies[PIXELS]:.1f}; largest class: {100 * classes.largest:.1f}")
    if arguments.json_file:
        rows = [{**key._asdict(), "accuracy": value} for key, value in accuracies.items()]
        content = {
            "run": arguments.run,
            "data": classes.train.location,
            **settings,
            "largest_class": 100 * classes.largest,
            "rows": rows,
        }
        Path(arguments.json_file).write_text(json.dumps(content, indent=1) + "\n")
