"""Weights that a new run begins with: another run's, or those of any file with an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepmim_scale.checkpoint import networks
from deepmim_scale.checkpoint.encoders import Encoder, is_run, load_encoder
from deepmim_scale.checkpoint.sizes import EncoderSizes
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.image_format import show_size
from deepmim_scale.models import build_model
from deepmim_scale.models.classifier import resize_position_table
from deepmim_scale.parallel.stages import global_parameters

_DECODING = ("decoders.", "carries.")
_TABLE = "pos_embed"


@dataclass(frozen=True)
class Initial:
    """Weights by their names in the whole model, and what to tell about them."""

    tensors: dict[str, Tensor]
    note: str


def initial_weights(config: RunConfig) -> Initial:
    """What `--init-from` gives a run, in its sizes; UserError where it does not fit."""
    encoder = load_encoder(config.init_from)
    _check_sizes(encoder, config)
    wanted = {n: p.shape for n, p in build_model(config.model, device="meta").named_parameters()}
    source = _deepened(encoder, config)
    taken = {name: value for name, value in source.items() if name in wanted}
    notes = [f"the encoder of {encoder.sizes.depth} blocks"]
    if encoder.sizes.depth != config.model.depth:
        notes[0] += f", {_WAYS[config.init_depth]} to {config.model.depth}"
    old = encoder.sizes.grid
    if old != config.model.grid:
        taken[_TABLE] = resize_position_table(taken[_TABLE], config.model.grid, old)
        notes.append(f"its position table resized to {show_size(config.model.img_size)} px")
    taken |= {
        name: value
        for name, value in _decoders(config.init_from).items()
        # Tables belong to the resolution, and are made new.
        if name in wanted and value.shape == wanted[name] and not name.endswith(_TABLE)
    }
    new = sorted({_part(name) for name in set(wanted) - set(taken) if not name.endswith(_TABLE)})
    decoders = sorted({_part(name) for name in taken if name.startswith(_DECODING)} - set(new))
    if decoders:
        notes.append(f"decoders {', '.join(decoders)}")
    text = f"begins with {' and '.join(notes)} of {config.init_from}"
    return Initial(taken, f"{text}; new: {', '.join(new) or 'nothing'}")


def put(initial: Initial, module: nn.Module) -> None:
    """Copy into a stage or a whole model what it holds of these weights."""
    with torch.no_grad():
        for name, parameter in global_parameters(module).items():
            if name in initial.tensors:
                parameter.copy_(initial.tensors[name])


def _part(name: str) -> str:
    parts = name.split(".")
    return parts[1] if name.startswith(_DECODING) else parts[0]


def _check_sizes(encoder: Encoder, config: RunConfig) -> None:
    ours, theirs = EncoderSizes.of(config.model), encoder.sizes
    for name in ("patch_size", "embed_dim", "num_heads", "mlp_ratio", "in_chans"):
        if getattr(ours, name) != getattr(theirs, name) and getattr(theirs, name):
            raise UserError(
                f"init_from={config.init_from}: has {name} {getattr(theirs, name):g}, the run "
                f"{getattr(ours, name):g}; give the same with --{name.replace('_', '-')}"
            )
    if theirs.depth > ours.depth or (theirs.depth < ours.depth and config.init_depth == "same"):
        remedy = "fewer cannot be chosen"
        if theirs.depth < ours.depth:
            remedy = "choose --init-depth stack or interleave"
        raise UserError(
            f"init_from={config.init_from}: has {theirs.depth} blocks, the run {ours.depth}; "
            f"{remedy}"
        )


_WAYS = {"same": "unchanged", "stack": "stacked", "interleave": "interleaved"}


def _deepened(encoder: Encoder, config: RunConfig) -> dict[str, Tensor]:
    """The encoder's tensors with its blocks repeated up to the run's depth."""
    have, want = encoder.sizes.depth, config.model.depth
    result = {n: t for n, t in encoder.tensors.items() if not n.startswith("blocks.")}
    for block in range(want):
        origin = block * have // want if config.init_depth == "interleave" else block % have
        prefix = f"blocks.{origin}."
        for name, value in encoder.tensors.items():
            if name.startswith(prefix):
                result[f"blocks.{block}.{name.removeprefix(prefix)}"] = value
    return result


def _decoders(source: str) -> Mapping[str, Tensor]:
    """Decoders, with what feeds them, of a run; files have none that are ours."""
    run = is_run(source)
    if run is None:
        return {}
    weights = networks.trained(*run).state_dict()
    return {name: value for name, value in weights.items() if name.startswith(_DECODING)}
