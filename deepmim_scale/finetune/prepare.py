"""Everything about a fine-tuning run that is settled before processes start."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from deepmim_scale.arguments import writable
from deepmim_scale.checkpoint.encoders import Encoder, load_encoder
from deepmim_scale.checkpoint.sizes import EncoderSizes
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.ds_config import (
    BatchSizes,
    bundled,
    load_ds_config,
    resolve_batch,
    resolve_ds_config,
)
from deepmim_scale.errors import UserError
from deepmim_scale.finetune.data import LabelledSources, open_labelled
from deepmim_scale.finetune.model import load_encoder_into
from deepmim_scale.finetune.presets import load_finetune_preset
from deepmim_scale.finetune.settings import FinetuneConfig
from deepmim_scale.finetune.transform import Transform, evaluation_transform, train_transform
from deepmim_scale.image_format import show_size
from deepmim_scale.models.classifier import build_classifier
from deepmim_scale.operation import Operation
from deepmim_scale.plan.cost import block_cost
from deepmim_scale.runs.folder import CONFIG, FINE_TUNED, fine_tuned
from deepmim_scale.runs.lock import check_free
from deepmim_scale.runs.resume import check_folder
from deepmim_scale.train.loggers import check_loggers
from deepmim_scale.train.prepare import batch_line, check_length, check_machine, default_ds_config

# Changing these does not change what is learned.
_FREE = Operation.model_fields.keys() | {
    "preset",
    "data",
    "cache",
    "output",
    "deepspeed_config",
    "microbatches",
    "evaluates_only",
    "top",
    "reduction",
    "loader_workers",
    "on_bad",
    "validate_every",
}
_PATHS = ("weights", "data", "cache", "output", "deepspeed_config")


@dataclass(frozen=True)
class PreparedFinetune:
    """A fine-tuning run that has passed every check."""

    config: FinetuneConfig
    changes: list[str]
    """What was set beside the preset, as words."""
    ds_config: dict[str, Any]
    batch: BatchSizes
    samples: SamplePlan
    sources: LabelledSources
    sizes: EncoderSizes
    model: Any
    """The ViT on the CPU, with its first weights."""
    notes: tuple[str, ...]
    """Where the weights come from, a line each."""
    transforms: tuple[Transform, Transform]
    """Of training and of evaluation."""
    may_resume: bool
    """The output folder holds this run."""

    @property
    def top(self) -> int:
        """How many of the likeliest classes the second accuracy counts."""
        return self.config.top or min(5, len(self.sources.names))

    @property
    def training_flops(self) -> int:
        """Per image, forward and backward of blocks and patch embedding; heads are left out."""
        s = self.sizes
        rows, columns = s.grid
        patches = rows * columns
        block = block_cost(s.embed_dim, s.mlp_ratio, patches + 1)
        embedding = 2 * patches * s.in_chans * s.patch_size**2 * s.embed_dim
        return s.depth * block.training_flops + 2 * embedding


def prepare(config: FinetuneConfig) -> PreparedFinetune:
    """Check a run for the processes that the launcher started; UserError for a mistake."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    changes = _changes(config)
    if config.evaluates_only:  # counts images one by one, so that no batch has to come out even
        config = config.replace(global_batch=None, microbatches=None)
    batch = resolve_batch(config, num_replicas=world)
    config = config.replace(global_batch=batch.global_batch, microbatches=None)
    given = load_ds_config(config.deepspeed_config) if config.deepspeed_config else None
    sources = open_labelled(config.data, config.cache, config.on_bad)
    num_classes = len(sources.names)
    if config.top is not None and config.top > num_classes:
        raise UserError(f"top={config.top}: there are {num_classes} classes; give at most as many")
    encoder = load_encoder(config.weights, config.from_step) if config.weights else None
    if config.evaluates_only and encoder is not None:  # its head knows what it reads
        config = config.replace(pool="mean" if encoder.pools_mean else "class")
    sizes = _resolve_sizes(config, encoder)
    config = config.replace(**{k: v for k, v in asdict(sizes).items() if k != "in_chans"})
    may_resume = False
    if not config.evaluates_only:
        check_loggers(config.log_to)
        check_free(config.output)
        may_resume = check_folder(config.output, config.resume, "", lambda: _both(config))
    step_size = 1 if config.evaluates_only else batch.global_batch
    samples = SamplePlan(len(sources.train), config.seed, step_size)
    check_length(config, samples.steps_per_epoch)
    given = given or load_ds_config(bundled(default_ds_config()))
    check_machine(given, config.deepspeed_config, config.optimizer)
    ds_config, _ = resolve_ds_config(given, config, batch)
    model = build_classifier(sizes, num_classes, config.pool, config.drop_path, config.seed)
    notes = _put_weights(config, model, encoder, num_classes)
    size = sizes.img_size
    assert isinstance(size, int), "checked with the sizes"
    training = train_transform(
        size,
        auto_augment=config.auto_augment,
        min_crop=config.min_crop,
        flip=config.flip,
        erase=config.erase,
    )
    transforms = training, evaluation_transform(size, config.crop_share)
    return PreparedFinetune(
        config,
        changes,
        ds_config,
        batch,
        samples,
        sources,
        sizes,
        model,
        notes,
        transforms,
        may_resume,
    )


def _resolve_sizes(config: FinetuneConfig, encoder: Encoder | None) -> EncoderSizes:
    """The settings' sizes, or where they have none the weights'; UserError where they differ."""
    names = [f.name for f in fields(EncoderSizes) if f.name != "in_chans"]
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if encoder is None:
        given = {"mlp_ratio": 4.0} | given
        absent = [name for name in names if name not in given]
        if absent:
            raise UserError(
                f"{absent[0]}: missing; give weights to start from, or a --preset, or "
                f"--{absent[0].replace('_', '-')}"
            )
        sizes = EncoderSizes(**given)
    else:
        theirs = encoder.sizes
        for name in ("patch_size", "embed_dim", "depth", "mlp_ratio"):
            if given.get(name, getattr(theirs, name)) != getattr(theirs, name):
                raise UserError(
                    f"{name}={given[name]}: the weights of {encoder.source} have "
                    f"{getattr(theirs, name):g}; leave it out, or give other weights or another "
                    "--preset"
                )
        sizes = replace(theirs, **given)
    if not isinstance(sizes.img_size, int):
        size = show_size(sizes.img_size)
        raise UserError(f"img_size={size}: fine-tuning takes square images; give --img-size SIDE")
    if sizes.in_chans != 3:
        raise UserError(f"in_chans={sizes.in_chans}: fine-tuning takes RGB images; give others")
    if sizes.num_heads == 0:
        raise UserError(f"num_heads: {config.weights} does not tell it; give --num-heads")
    for name, divisor in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
        if getattr(sizes, name) % getattr(sizes, divisor):
            raise UserError(
                f"{name}={getattr(sizes, name)}: must be divisible by {divisor}="
                f"{getattr(sizes, divisor)}; change one of the two"
            )
    return sizes


def _put_weights(
    config: FinetuneConfig, model: Any, encoder: Encoder | None, num_classes: int
) -> tuple[str, ...]:
    if encoder is None:
        if config.evaluates_only:
            raise UserError("eval=True: evaluates a fine-tuned model; give its run or file")
        return ("weights: from scratch",)
    keep = encoder.head > 0 and config.head == "auto"
    if config.evaluates_only and not keep:
        raise UserError(f"eval=True: {encoder.source} has no head; give a fine-tuned run or file")
    if keep and encoder.head != num_classes:
        raise UserError(
            f"weights={config.weights}: its head has {encoder.head} classes, the data "
            f"{num_classes}; give --head new, or the data it was trained on"
        )
    load_encoder_into(model, encoder, keep_head=keep, seed=config.seed)
    head = "its head" if keep else "a new head"
    resized = encoder.tensors["pos_embed"].shape[1] != model.state_dict()["pos_embed"].shape[1]
    table = f", position table resized to {config.img_size} px" if resized else ""
    return (f"weights: {encoder.source} with {head}{table}", *encoder.notes)


def _changes(config: FinetuneConfig) -> list[str]:
    start = load_finetune_preset(config.preset) if config.preset else FinetuneConfig()
    base = start.model_dump()
    return [f"{k}={v}" for k, v in config.model_dump().items() if v not in (None, "", base[k])]


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in _FREE}
    return kept | {"weights": os.path.realpath(kept["weights"]) if kept["weights"] else ""}


def _both(config: FinetuneConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the results, of this run and of the one in its folder."""
    saved = fine_tuned(config.output)
    if not saved:
        raise UserError(f"output={config.output}: holds a run of pre-training; choose another")
    theirs = FinetuneConfig.load(saved).model_dump(mode="json")
    return _compared(config.model_dump(mode="json")), _compared(theirs)


def write_config(config: FinetuneConfig) -> None:
    """Save the resolved settings, with absolute paths."""
    content = config.model_dump(mode="json")
    del content["inject"]  # says nothing about the next start
    content |= {key: os.path.abspath(content[key]) for key in _PATHS if content[key]}
    path = writable("output", Path(config.output) / CONFIG)
    path.write_text(json.dumps({FINE_TUNED: content}, indent=1) + "\n")


def describe(prepared: PreparedFinetune) -> Iterator[str]:
    """What a run prints at its start, line by line."""
    config, sources = prepared.config, prepared.sources
    yield f"preset {config.preset or 'none'}: {' '.join(prepared.changes) or 'unchanged'}"
    yield (
        f"data: {sources.train.describe()}; validation {len(sources.val)}, "
        f"{len(sources.names)} classes"
    )
    yield from prepared.notes
    if not config.evaluates_only:
        yield batch_line(config.blr, prepared.batch)
