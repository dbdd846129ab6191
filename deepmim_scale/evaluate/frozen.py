"""Frozen encoders of any origin: a run's, a file's, or a timm network's with weights from a file.

Legend: N images, L patches, D width, S side of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from deepmim_scale.checkpoint import networks
from deepmim_scale.checkpoint.encoders import Encoder, is_run, load_encoder
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.finetune.model import load_encoder_into
from deepmim_scale.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from deepmim_scale.methods.base import even_taps
from deepmim_scale.models import Model
from deepmim_scale.models.classifier import build_classifier
from deepmim_scale.runs.folder import load_run_config

TIMM_PREFIX = "timm:"
NUM_BLOCKS = 4


@dataclass(frozen=True)
class FrozenEncoder:
    """What probes look at: tokens after some blocks."""

    source: str
    module: nn.Module
    tokens_of: Callable[[Tensor], dict[int, Tensor]]
    blocks: tuple[int, ...]
    """Their numbers, from 1, ascending."""
    config: RunConfig
    """How images are loaded: of a run its own, else defaults with the encoder's input size."""
    width: int
    """D."""

    def to(self, device: torch.device) -> FrozenEncoder:
        """The same with its weights on `device`."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def tokens(self, images: Tensor) -> dict[int, Tensor]:
        """Tokens [N, 1 + L, D] after each of `blocks`, class token first, the last ones normed.

        Images are uint8, or floating and normalized by ImageNet's statistics, [N, 3, S, S].
        """
        return self.tokens_of(images)


def open_frozen(
    source: str, from_step: str = "", model: str = "", blocks: tuple[int, ...] = ()
) -> tuple[FrozenEncoder, FrozenEncoder]:
    """The encoder of a run or file, and the same network untrained.

    `model` is `timm:NAME` for a file of that network's weights. Blocks are a run's taps, or four
    evenly spread ones. UserError for what cannot be opened.
    """
    if model:
        return _of_timm(source, model, blocks)
    run = is_run(source)
    if run is not None:
        return _of_run(run[0], from_step or run[1], blocks)
    return _of_file(load_encoder(source, from_step), blocks)


def _check_blocks(wanted: tuple[int, ...], depth: int, usual: tuple[int, ...]) -> tuple[int, ...]:
    if any(not 1 <= block <= depth for block in wanted):
        text = ",".join(map(str, wanted))
        raise UserError(f"blocks={text}: must be numbers from 1 to the {depth} blocks there are")
    return tuple(sorted(set(wanted))) or usual


def _of_run(
    run: str, from_step: str, wanted: tuple[int, ...]
) -> tuple[FrozenEncoder, FrozenEncoder]:
    config = load_run_config(run)
    blocks = _check_blocks(wanted, config.model.depth, config.model.taps)
    trained, fresh = networks.trained(run, from_step), networks.fresh(config).eval()
    first, second = (
        FrozenEncoder(
            run, model, _tokens_of_ours(model, blocks), blocks, config, config.model.embed_dim
        )
        for model in (trained, fresh)
    )
    return first, second


def _tokens_of_ours(model: Model, blocks: tuple[int, ...]) -> Callable[[Tensor], dict[int, Tensor]]:
    def tokens(images: Tensor) -> dict[int, Tensor]:
        return {n: x for n, x in enumerate(model.features(images), start=1) if n in blocks}

    return tokens


def _loading(img_size: tuple[int, int], patch_size: int) -> RunConfig:
    """Defaults for loading images of another input size; nothing else of it is used."""
    return RunConfig(model=ModelConfig(img_size=img_size, patch_size=patch_size))


def _of_file(encoder: Encoder, wanted: tuple[int, ...]) -> tuple[FrozenEncoder, FrozenEncoder]:
    sizes = encoder.sizes
    if sizes.num_heads == 0:
        raise UserError(f"{encoder.source}: tells no number of heads; give --model timm:NAME")
    for note in encoder.notes:
        print(note)
    pair = [build_classifier(sizes, 0, "mean" if encoder.pools_mean else "class") for _ in range(2)]
    load_encoder_into_frozen(pair[0], encoder)
    first, second = (_of_vit(encoder.source, model, wanted, None) for model in pair)
    return first, second


def load_encoder_into_frozen(model: nn.Module, encoder: Encoder) -> None:
    """Weights without a head; a fine-tuned mean has no norm for single tokens either."""
    kept = {n: w for n, w in encoder.tensors.items() if not n.startswith(("head.", "fc_norm."))}
    model.fc_norm = nn.Identity()
    load_encoder_into(model, replace(encoder, tensors=kept), keep_head=True, seed=0)


def _of_timm(file: str, model: str, wanted: tuple[int, ...]) -> tuple[FrozenEncoder, FrozenEncoder]:
    name = model.removeprefix(TIMM_PREFIX)
    if not model.startswith(TIMM_PREFIX) or not timm.is_model(name):
        raise UserError(f"model={model}: must be timm: and the name of a model, as timm:vit_...")
    if not Path(file).is_file():
        raise UserError(f"{file}: must be a file of the weights of {model}")
    try:
        trained = timm.create_model(name, num_classes=0, checkpoint_path=file)
        fresh = timm.create_model(name, num_classes=0)
        first, second = (_of_vit(file, network, wanted, name) for network in (trained, fresh))
    except (RuntimeError, KeyError, ValueError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model={model}: cannot take the weights of {file} ({reason}); give those of a ViT"
        ) from None
    return first, second


def _of_vit(
    source: str, model: nn.Module, wanted: tuple[int, ...], name: str | None
) -> FrozenEncoder:
    model.eval()
    depth = len(model.blocks)  # type: ignore[arg-type]
    usual = even_taps(depth, min(NUM_BLOCKS, depth))
    blocks = _check_blocks(wanted, depth, usual)
    size, (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size  # type: ignore[union-attr, misc]
    statistics = timm.data.resolve_model_data_config(model) if name else None

    def tokens(images: Tensor) -> dict[int, Tensor]:
        pixels = normalize(images)
        if statistics is not None:
            pixels = _renormalized(pixels, statistics["mean"], statistics["std"])
        found = model.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=[block - 1 for block in blocks],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        result = {}
        for block, (patches, prefix) in zip(blocks, found, strict=True):
            together = torch.cat([prefix[:, :1], patches], 1)
            result[block] = model.norm(together) if block == depth else together  # type: ignore[operator]
        return result

    config = _loading(size, patch)  # type: ignore[arg-type]
    return FrozenEncoder(source, model, tokens, blocks, config, model.embed_dim)  # type: ignore[arg-type]


def _renormalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels by ImageNet's statistics, by others."""
    if tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD:
        return pixels
    ours, their_std, their_mean, our_std = (
        pixels.new_tensor(v).view(1, -1, 1, 1) for v in (IMAGENET_MEAN, std, mean, IMAGENET_STD)
    )
    return (pixels * our_std + ours - their_mean) / their_std
