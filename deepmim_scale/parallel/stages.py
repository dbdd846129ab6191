"""The stages of one rank, and room for what crosses between stages."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepmim_scale.config import ModelConfig
from deepmim_scale.methods.base import TensorSpec
from deepmim_scale.models.blocks import initialize
from deepmim_scale.models.stage import Recompute, Stage
from deepmim_scale.pipeline.ir import Pipeline
from deepmim_scale.plan.messages import dtype_of
from deepmim_scale.plan.partition import Layout
from deepmim_scale.precision import Precision


@dataclass(frozen=True)
class TensorRoom:
    """Shape and type of one tensor of a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def for_batch(cls, spec: TensorSpec, batch: int, precision: Precision) -> TensorRoom:
        """Room for the tensors of so many images."""
        return cls((batch, *spec.shape), getattr(torch, dtype_of(spec, precision)))

    def empty(self, device: torch.device) -> Tensor:
        """An uninitialized tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class RankStages(nn.Module):
    """One rank's stages (two on the V), as the module of its engine."""

    def __init__(self, config: ModelConfig, stages: dict[int, Stage]) -> None:
        super().__init__()
        self.config = config
        # Module names cannot be numbers.
        self.stages = nn.ModuleDict({str(number): stage for number, stage in stages.items()})

    def __getitem__(self, number: int) -> Stage:
        stage = self.stages[str(number)]
        assert isinstance(stage, Stage), "only stages are held here"
        return stage


def global_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have in the whole model, whichever rank holds them."""
    # Blocks and decoders carry global numbers already; only the stage's own prefix is local.
    named = module.named_parameters()
    return {re.sub(r"^stages\.\d+\.", "", name): parameter for name, parameter in named}


def part_of_stage(stage: int, is_decoder: bool) -> str:
    """How a stage's encoder slice, or its decoders, are called where gradients are summed."""
    return f"{'decoders' if is_decoder else 'encoder'} of stage {stage}"


def part_of_parameter(name: str) -> tuple[str, int]:
    """The part that a parameter of `RankStages` belongs to, and its place in that part.

    Gradients of a part appear from the last place to the first: decoder by decoder, and of the
    encoder's blocks first the MLP, then the attention.
    """
    found = re.match(r"stages\.(\d+)\.(decoders\.)?\D*(\d*)\.?(mlp|norm2)?", name)
    if found is None:
        return "", 0
    place = 2 * int(found[3] or 0) + (found[4] is not None)
    return part_of_stage(int(found[1]), found[2] is not None), place


def build_rank(
    config: ModelConfig,
    layout: Layout,
    pipeline: Pipeline,
    pp_rank: int,
    *,
    seed: int,
    recompute: Recompute = "none",
) -> RankStages:
    """Build and initialize the stages of a rank; weights equal those of the whole model."""
    stages = {}
    for number in pipeline.stages_of(pp_rank):
        blocks = layout[number]
        stages[number] = Stage(config, blocks.first + 1, blocks.last, recompute)
        initialize(stages[number], seed)
    return RankStages(config, stages)
