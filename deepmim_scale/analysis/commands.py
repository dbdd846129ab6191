"""Command line of the pictures: `deepmim-scale analyze NAME RUN`."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.config import FromStep
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json
from deepmim_scale.methods.base import even_taps
from deepmim_scale.settings import FrozenConfig

SHOWN = 6  # blocks in the printed table


class _Arguments(FrozenConfig):
    run: tyro.conf.Positional[str]
    """Folder of a run."""
    output: str = ""
    """Folder for the picture (default: the run's)."""
    json_file: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers (default: beside the picture, its name with .json)."""


class _CheckpointArguments(_Arguments):
    from_step: FromStep = ""
    """The checkpoint, as step_00000800 or 800 (default: the newest intact one)."""


class ReconstructArguments(_CheckpointArguments):
    """Draw validation images, masked and filled in by each decoder, and print their errors."""

    data: str = ""
    """Image folder with a validation part (default: the run's)."""


class LossesArguments(_Arguments):
    """Draw each decoder's loss over the steps of a run."""


class TimelineArguments(_Arguments):
    """Draw the step that `--trace` wrote, on all ranks, above its simulation."""


class AttentionArguments(_CheckpointArguments):
    """Measure and draw how far each head looks, on whole validation images."""

    data: str = ""
    """Image folder with a validation part (default: the run's)."""
    images: int = 256
    """How many validation images, spread over the classes."""


class CkaArguments(_CheckpointArguments):
    """Compare the representations of all blocks by linear CKA, on whole validation images."""

    run2: str = ""
    """Another run, at its newest checkpoint (default: RUN's blocks with each other)."""
    data: str = ""
    """Image folder with a validation part (default: the run's)."""
    images: int = 256
    """How many validation images, spread over the classes."""


def _outputs(arguments: _Arguments, name: str) -> tuple[Path, Path]:
    """Where picture and numbers go; UserError if they cannot."""
    picture = writable("output", Path(arguments.output or arguments.run) / f"{name}.png")
    return picture, writable("json", arguments.json_file or picture.with_suffix(".json"))


def run_reconstruct(arguments: ReconstructArguments) -> None:
    """Write reconstructions.png and .json, and print each decoder's validation error."""
    from deepmim_scale.runs.folder import load_run_config

    config = load_run_config(arguments.run)
    picture, json_file = _outputs(arguments, "reconstructions")
    from deepmim_scale.analysis import reconstruct
    from deepmim_scale.evaluate.features import load_model

    model = load_model(arguments.run, arguments.from_step)
    batches = reconstruct.validation(config, arguments.data or config.data)
    count = sum(len(batch.images) for batch in batches)
    errors = reconstruct.validation_errors(model, batches)
    guess, meaning = reconstruct.GUESSES[config.model.norm_pix]
    print(f"validation masked mean squared error ({count} images, normalized pixels)")
    if config.model.norm_pix:
        print(f"  {reconstruct.GIVEN} to the decoders, the mean to the guess")
    for name, value in errors.items():
        print(f"  {name:14s} {value:.4f}  {value / errors[guess]:5.2f} of guessing {meaning}")
    reconstruct.draw(model, reconstruct.pick_examples(batches), picture)
    content = {"images": count, "guess": guess, "errors": errors}
    _write(content, picture, json_file)


def run_losses(arguments: LossesArguments) -> None:
    """Write losses.png and .json, and print how far each decoder's loss fell."""
    from deepmim_scale.analysis.losses import draw, loss_drop
    from deepmim_scale.runs.folder import METRICS, load_run_config, read_metrics

    run = arguments.run
    load_run_config(run)
    rows = read_metrics(run) if (Path(run) / METRICS).is_file() else []
    if not rows:
        raise UserError(f"{run}: has no steps yet; train first")
    picture, json_file = _outputs(arguments, "losses")
    print("loss, mean of the first and of the last tenth of the steps")
    content: dict[str, Any] = {"step": rows[-1]["step"], "losses": {}}
    for name, (first, last) in loss_drop(rows).items():
        print(f"  {name:10s} {first:.4f} -> {last:.4f}  ({last / first:.2f})")
        ends = {"first": first, "last": last}
        content["losses"][name] = {k: v if isfinite(v) else None for k, v in ends.items()}
    draw(rows, picture)
    _write(content, picture, json_file)


def run_timeline(arguments: TimelineArguments) -> None:
    """Write timeline.png and .json of the newest traced step, and print where its time went."""
    from deepmim_scale.pipeline.draw import draw_gantts, timelines_of
    from deepmim_scale.runs.folder import TRACES, load_run_config

    run = arguments.run
    model = load_run_config(run).model
    traces = sorted(Path(run).glob(TRACES))
    if not traces:
        raise UserError(f"{run}: has no traced step; train with --trace N")
    picture, json_file = _outputs(arguments, "timeline")
    trace = read_json(traces[-1])
    shares = trace["shares_by_rank"]
    print(f"step {trace['step']}, share of a rank's time in %")
    print("  rank " + "".join(f"{name:>11s}" for name in shares[0]))
    for rank, share in enumerate(shares):
        print(f"  {rank:4d} " + "".join(f"{100 * value:11.1f}" for value in share.values()))
    name = f"{Path(run).name}, {model.method} of {model.depth} blocks, step {trace['step']}"
    titled = {}
    for kind, timeline in timelines_of(trace).items():
        took = f"{1e3 * timeline.makespan:.1f} ms, idle {timeline.idle_fraction:.1%}"
        titled[f"{name}, {kind}: {took}"] = timeline
    draw_gantts(titled, picture)
    _write({key: trace[key] for key in ("step", "shares", "shares_by_rank")}, picture, json_file)


def run_attention(arguments: AttentionArguments) -> None:
    """Write attention.png and attention.json, and print a line per block."""
    from deepmim_scale.runs.folder import load_run_config

    config = load_run_config(arguments.run)
    _check_images(arguments.images)
    picture, json_file = _outputs(arguments, "attention")
    from deepmim_scale.analysis import attention
    from deepmim_scale.analysis.images import evenly_spaced, open_validation, whole_images
    from deepmim_scale.evaluate.features import load_model

    source = open_validation(arguments.data or config.data, config.cache)
    ids = evenly_spaced(source, arguments.images)
    model = load_model(arguments.run, arguments.from_step)
    blocks = attention.measure(model, whole_images(config, source, ids))
    uniform = attention.patch_distances(*config.model.grid).mean().item()
    print(f"attention of {len(ids)} validation images; distances in patches")
    for block in blocks:
        low, high, mean = (f(block.distances) for f in (min, max, fmean))
        print(
            f"  block {block.block:2d}  distance {mean:5.2f}  heads {low:5.2f} to {high:5.2f}  "
            f"cosine between heads {block.head_cosine:.3f}"
        )
    print(f"  uniform attention: {uniform:.2f}")
    attention.draw(blocks, uniform, picture)
    content = {"images": len(ids), "uniform": uniform, "blocks": [asdict(b) for b in blocks]}
    _write(content, picture, json_file)


def run_cka(arguments: CkaArguments) -> None:
    """Write cka.png and cka.json, and print CKA between a few blocks."""
    from deepmim_scale.runs.folder import load_run_config

    runs = (arguments.run, arguments.run2 or arguments.run)
    # RUN may be given twice, to compare one of its checkpoints with its newest one.
    from_steps = (arguments.from_step, "" if arguments.run2 else arguments.from_step)
    sides = list(zip(runs, from_steps, strict=True))
    configs = [load_run_config(run) for run in runs]
    _check_images(arguments.images)
    picture, json_file = _outputs(arguments, "cka")
    from deepmim_scale.analysis import cka
    from deepmim_scale.analysis.images import evenly_spaced, open_validation, whole_images
    from deepmim_scale.evaluate.features import load_model

    data = arguments.data or configs[0].data
    source = open_validation(data, configs[0].cache)
    ids = evenly_spaced(source, arguments.images)
    if len(ids) < cka.FEWEST:
        raise UserError(f"data={data}: {len(ids)} validation images; cka needs {cka.FEWEST}")
    features = {
        side: cka.block_features(load_model(*side), whole_images(config, source, ids))
        for side, config in zip(sides, configs, strict=True)
    }
    table = cka.cka(features[sides[0]], features[sides[1]])
    print(f"linear CKA of blocks (rows: {runs[0]}, columns: {runs[1]}), {len(ids)} images")
    rows, columns = (even_taps(size, min(size, SHOWN)) for size in table.shape)
    print("         " + " ".join(f"{block:5d}" for block in columns))
    for row in rows:
        print(f"  {row:5d}  " + " ".join(f"{table[row - 1, c - 1]:5.2f}" for c in columns))
    names = [Path(run).name for run in runs]
    cka.draw(table, names, [config.model.taps for config in configs], picture)
    content = {"images": len(ids), "runs": runs, "cka": table.tolist()}
    _write(content, picture, json_file)


def _check_images(images: int) -> None:
    if images < 1:
        raise UserError(f"images={images}: must be positive")


def _write(content: dict[str, Any], picture: Path, json_file: Path) -> None:
    json_file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {picture} and {json_file}")
