"""The stages of one rank, and the shapes of what crosses between stages.

Legend: B images, K visible, L patches, D and d widths, P prediction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepmim_scale.config import ModelConfig
from deepmim_scale.ds_config import Precision
from deepmim_scale.models.blocks import initialize
from deepmim_scale.models.stage import Recompute, Stage
from deepmim_scale.pipeline.ir import Payload, Pipeline
from deepmim_scale.plan.cost import segment_of
from deepmim_scale.plan.partition import Layout

_PRODUCTS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "pure_bfloat16": torch.bfloat16,
    "pure_float16": torch.float16,
}


@dataclass(frozen=True)
class Spec:
    """Shape and type of one tensor of a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        """Room for it."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class RankStages(nn.Module):
    """One rank's stages (two on the V), as the module of its engine."""

    def __init__(self, stages: dict[int, Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(number): stage for number, stage in stages.items()})

    def __getitem__(self, number: int) -> Stage:
        stage = self.stages[str(number)]
        assert isinstance(stage, Stage), "only stages are held here"
        return stage


def global_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have in the whole model, whichever rank holds them."""
    named = module.named_parameters()
    return {re.sub(r"^stages\.\d+\.", "", name): parameter for name, parameter in named}


def build_rank(
    config: ModelConfig,
    layout: Layout,
    pipeline: Pipeline,
    rank: int,
    *,
    seed: int,
    recompute: Recompute = "none",
) -> RankStages:
    """Build and initialize the stages of a rank; weights equal those of the whole model."""
    stages = {}
    for number in pipeline.stages_of(rank):
        blocks = layout[number]
        stages[number] = Stage(config, blocks.first + 1, blocks.last, recompute)
        initialize(stages[number], seed)
    return RankStages(stages)


def message_specs(
    config: ModelConfig,
    layout: Layout,
    payload: Payload,
    source: int,
    target: int,
    *,
    batch: int,
    precision: Precision,
) -> list[Spec]:
    """The tensors of one message, in order.

    Under autocast the hidden state is the residual stream in fp32 (it travels as it is, so that a
    boundary changes no bit), while carries and predictions come out of 16-bit matrix products.
    """
    product = _PRODUCTS[precision]
    residual = product if precision.startswith("pure") else torch.float32
    if payload in ("prediction", "prediction_gradient"):
        shallow = layout[min(source, target)]
        masked = config.num_patches - config.num_visible
        return [Spec((batch, masked, config.out_dim), product)] * len(shallow.decoders)
    tokens = config.num_visible + 1
    specs = [Spec((batch, tokens, config.embed_dim), residual)]
    if config.method == "mirl":
        carries = segment_of(config, layout[max(source, target)].first) + 1
        specs += [Spec((batch, tokens, config.decoder_embed_dim), product)] * carries
    return specs
