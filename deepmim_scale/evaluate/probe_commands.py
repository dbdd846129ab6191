"""Command line of the probes that train: `deepmim-scale evaluate linear-sgd|attentive RUN`.

Both run in one process, or under torchrun and deepspeed in as many as these start.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from deepmim_scale.arguments import writable
from deepmim_scale.config import FromStep
from deepmim_scale.errors import UserError
from deepmim_scale.evaluate.commands import data_and_cache
from deepmim_scale.image_format import show_size
from deepmim_scale.settings import (
    File,
    Folder,
    FrozenConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    shown_as,
)

if TYPE_CHECKING:
    import torch

    from deepmim_scale.evaluate.frozen import FrozenEncoder
    from deepmim_scale.evaluate.trained_probe import Contestant, ProbePlan
    from deepmim_scale.finetune.data import LabelledSources

Row = dict[str, Any]


class _TrainedArguments(FrozenConfig):
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
    json_file: Annotated[str, tyro.conf.arg(name="json")] = ""
    """Also write the accuracies to this file."""
    state: File = ""
    """File for where the probe stands; the same command goes on from it."""
    save_every: PositiveInt = 1000
    """Steps between its updates."""
    loader_workers: NonNegativeInt = 2
    """Processes that decode for each rank; 0 leaves it to the rank itself."""
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest area of a random crop, as a share of the image."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of images that are mirrored."""
    crop_share: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the short side seen in evaluation."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of heads, order and crops."""


class LinearSgdArguments(_TrainedArguments):
    """MAE's linear probe: LARS on batch-normalized frozen features, with crops and flips."""

    epochs: PositiveFloat = 90.0
    """Length, epochs."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Linear warm-up from 0, epochs; then a half-cosine to 0."""
    blr: PositiveFloat = 0.1
    """Base learning rate: lr = blr * global_batch / 256."""
    global_batch: PositiveInt = 16384
    """Images per step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of the linear layer's matrix."""
    pool: Literal["class", "mean"] = "class"
    """The class token, as MAE, or the mean of the patches."""


class AttentiveArguments(_TrainedArguments):
    """CAPI's attentive probe: a learned query attends to the frozen patch tokens of each block."""

    steps: PositiveInt = 12500
    """Length, steps of AdamW (0.9, 0.95)."""
    warmup_steps: NonNegativeInt = 1250
    """Linear warm-up from 0; then a half-cosine to 0."""
    global_batch: PositiveInt = 1024
    """Images per step."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], shown_as("FLOAT ...")] = (
        1e-5,
        2e-5,
        5e-5,
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        1e-2,
    )
    """Rates that are tried at once, times global_batch / 256."""
    weight_decays: Annotated[tuple[NonNegativeFloat, ...], shown_as("FLOAT ...")] = (
        5e-4,
        1e-3,
        5e-2,
    )
    """Weight decays that are tried with each rate; none for biases."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training images that choose among them."""
    beside: Annotated[tuple[Literal["knn", "linear"], ...], shown_as("knn linear")] = ()
    """Also count these on the mean of the patches, in the same table."""


def run_linear_sgd(arguments: LinearSgdArguments) -> None:
    """Print a line for each block."""

    def plan_of(sources: LabelledSources, encoder: FrozenEncoder) -> ProbePlan:
        from deepmim_scale.data.sample_plan import SamplePlan
        from deepmim_scale.data.source import good_ids
        from deepmim_scale.train.optim import learning_rate

        count = len(good_ids(sources.train))
        per_epoch = SamplePlan(count, arguments.seed, arguments.global_batch).steps_per_epoch
        steps = max(round(arguments.epochs * per_epoch), 1)

        def rate(peak: float, step: int) -> float:
            return learning_rate(
                peak,
                step / per_epoch,
                warmup_epochs=arguments.warmup_epochs,
                total_epochs=arguments.epochs,
            )

        return _plan(arguments, encoder, steps, arguments.global_batch, rate, held_out=0.0)

    def contestants(encoder: FrozenEncoder, num_classes: int) -> list[Contestant]:
        from deepmim_scale.evaluate.heads import LinearHead
        from deepmim_scale.evaluate.trained_probe import Contestant
        from deepmim_scale.train.optim import Lars

        peak = arguments.blr * arguments.global_batch / 256
        heads = [
            (block, LinearHead(encoder.width, num_classes, arguments.pool))
            for block in encoder.blocks
        ]
        return [
            Contestant(
                block,
                "",
                head,
                Lars(head.parameters(), 0.0, weight_decay=arguments.weight_decay),
                peak,
            )
            for block, head in heads
        ]

    _run(arguments, "linear-sgd", plan_of, contestants, ())


def run_attentive(arguments: AttentiveArguments) -> None:
    """Print a line for each block, with the setting that the held-out images chose."""
    if not arguments.learning_rates or not arguments.weight_decays:
        raise UserError("learning_rates: need one or more of them, and of --weight-decays")

    def plan_of(sources: LabelledSources, encoder: FrozenEncoder) -> ProbePlan:
        from deepmim_scale.data.sample_plan import SamplePlan
        from deepmim_scale.evaluate.trained_probe import split
        from deepmim_scale.train.optim import learning_rate

        training, _ = split(sources.train, arguments.held_out, arguments.seed)
        # Told before processes wait for each other.
        SamplePlan(len(training), arguments.seed, arguments.global_batch)

        def rate(peak: float, step: int) -> float:
            return learning_rate(
                peak, step, warmup_epochs=arguments.warmup_steps, total_epochs=arguments.steps
            )

        return _plan(
            arguments,
            encoder,
            arguments.steps,
            arguments.global_batch,
            rate,
            held_out=arguments.held_out,
        )

    def contestants(encoder: FrozenEncoder, num_classes: int) -> list[Contestant]:
        import torch

        from deepmim_scale.evaluate.heads import AttentiveHead
        from deepmim_scale.evaluate.trained_probe import Contestant

        found = []
        for block in encoder.blocks:
            for rate in arguments.learning_rates:
                for decay in arguments.weight_decays:
                    head = AttentiveHead(encoder.width, num_classes)
                    named = list(head.named_parameters())
                    groups = [
                        {"params": [p for n, p in named if "bias" not in n], "weight_decay": decay},
                        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
                    ]
                    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
                    peak = rate * arguments.global_batch / 256
                    setting = f"lr {rate:g}, decay {decay:g}"
                    found.append(Contestant(block, setting, head, optimizer, peak))
        return found

    _run(arguments, "attentive", plan_of, contestants, arguments.beside)


def _plan(
    arguments: _TrainedArguments,
    encoder: FrozenEncoder,
    steps: int,
    global_batch: int,
    rate: Any,
    *,
    held_out: float,
) -> ProbePlan:
    from deepmim_scale.evaluate.trained_probe import ProbePlan
    from deepmim_scale.finetune.transform import evaluation_transform, probe_transform

    size = encoder.config.model.img_size
    if not isinstance(size, int):
        shown = show_size(size)
        raise UserError(f"img_size={shown}: trained probes take square images; use knn or linear")
    training = probe_transform(size, min_crop=arguments.min_crop, flip=arguments.flip)
    return ProbePlan(
        steps,
        global_batch,
        rate,
        (training, evaluation_transform(size, arguments.crop_share)),
        held_out,
        arguments.loader_workers,
        arguments.save_every,
        arguments.seed,
    )


def _run(
    arguments: _TrainedArguments, probe: str, plan_of: Any, contestants: Any, beside: Any
) -> None:
    data, cache = data_and_cache(arguments.run, arguments.data)
    for key, path in (("json", arguments.json_file), ("state", arguments.state)):
        if path:
            writable(key, path)
    import torch

    from deepmim_scale.evaluate.frozen import open_frozen
    from deepmim_scale.evaluate.trained_probe import TrainedProbe
    from deepmim_scale.finetune.data import open_labelled
    from deepmim_scale.parallel import zero

    sources = open_labelled(data, cache, "fail")
    encoder, _ = open_frozen(arguments.run, arguments.from_step, arguments.model, arguments.blocks)
    plan = plan_of(sources, encoder)
    torch.manual_seed(arguments.seed)
    heads = contestants(encoder, len(sources.names))
    settings = arguments.model_dump(mode="json") | {"data": sources.train.sha, "probe": probe}
    for key in ("json_file", "state", "save_every", "loader_workers", "beside"):
        settings.pop(key, None)
    device: torch.device = zero.init_processes()
    trained = TrainedProbe(encoder, sources, heads, plan, device)
    trained.run(Path(arguments.state) if arguments.state else None, settings)
    found = trained.choose()
    torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        return
    others = _beside(encoder, data, cache, beside) if beside else {}
    rows = [
        {"block": block, "setting": setting, "accuracy": accuracy, **others.get(block, {})}
        for block, (setting, accuracy) in found.items()
    ]
    _print(probe, rows, beside)
    if arguments.json_file:
        content = {"run": arguments.run, "data": data, "probe": probe, "rows": rows}
        Path(arguments.json_file).write_text(json.dumps(content, indent=1) + "\n")


def _beside(
    encoder: FrozenEncoder, data: str, cache: str, names: tuple[str, ...]
) -> dict[int, Row]:
    """Accuracies in percent of other probes of each block, on the mean of the patches."""
    from deepmim_scale.data.classes import open_classes
    from deepmim_scale.evaluate.features import PIXELS, Key
    from deepmim_scale.evaluate.folder import Probe, features_of
    from deepmim_scale.evaluate.probes import knn_weighted, linear

    probes: dict[str, Probe] = {"knn": knn_weighted, "linear": partial(linear, num_splits=1)}
    classes = open_classes(data, cache)
    train, test = (features_of({"": encoder}, s, ("mean",)) for s in (classes.train, classes.val))
    assert PIXELS in train, "raw pixels come with all features"
    result: dict[int, Row] = {}
    for block in encoder.blocks:
        key = Key("", f"block{block:02d}", "mean")
        parts = train[key], classes.labels, test[key], classes.expected
        result[block] = {name: 100 * probes[name](*parts) for name in names}
    return result


def _print(probe: str, rows: list[Row], beside: tuple[str, ...]) -> None:
    titles = ["block", probe, *(f"{name}, mean" for name in beside), "chosen"]
    print("accuracy in % on the validation images")
    print(f"| {' | '.join(titles)} |")
    print("|" + "---|" * len(titles))
    for row in rows:
        numbers = [row["accuracy"], *(row[name] for name in beside)]
        cells = [str(row["block"]), *(f"{n:.1f}" for n in numbers), row["setting"] or "-"]
        print(f"| {' | '.join(cells)} |")
