"""The work that `pipeline_peers.py` gives to every pipeline: the same stages, losses and batches.

Kernels of the kind `sleep` wait instead of computing: each block and decoder for as long as its
FLOPs in ViT-B/12 say, forward, backward to the input and backward to the weight one by one. The
kinds `empty` and `small` compute for real: so little that only Python counts, and enough that the
saved activations have the proportions of ViT-B.
Legend: B images, K visible patches, D width, M micro-batches, P ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from deepmim_scale.batch import Batch, Masking
from deepmim_scale.config import ModelConfig
from deepmim_scale.models.stage import Stage
from deepmim_scale.models.weight_queue import current_queue
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.ir import Durations, Kind
from deepmim_scale.pipeline.registry import build_schedule
from deepmim_scale.plan.partition import Layout
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of
from deepmim_scale.presets import load_preset

Kernels = Literal["sleep", "empty", "small"]
NARROW = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
NARROW_DECODER = {"decoder_embed_dim": 8, "decoder_num_heads": 2, "decoder_depth": 1}
# 196 patches as ViT-B has, widths a quarter of its.
SMALL = {"img_size": 112, "patch_size": 8, "embed_dim": 192, "num_heads": 3}
SMALL_DECODER = {"decoder_embed_dim": 128, "decoder_num_heads": 4, "decoder_depth": 4}
# Sleeping blocks are halves of ViT-B/12's, so that eight stages can be cut too.
DEPTHS = {"sleep": 24, "empty": 16, "small": 16}


@dataclass(frozen=True)
class Lengths:
    """Seconds of one piece of work."""

    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class Work:
    """One model, its kernels and the micro-batches of a step."""

    kernels: Kernels
    num_microbatches: int
    seconds: float
    """What 1F1B on four stages takes for 8 micro-batches by simulation, where kernels sleep."""

    @cached_property
    def model(self) -> ModelConfig:
        """DeepMIM with four decoders, evenly spread."""
        depth = DEPTHS[self.kernels]
        taps = tuple(depth * (k + 1) // 4 for k in range(4))
        sizes: dict[str, Any] = (
            SMALL | SMALL_DECODER if self.kernels == "small" else NARROW | NARROW_DECODER
        )
        return ModelConfig(method="deepmim", depth=depth, taps=taps, **sizes)

    @cached_property
    def lengths(self) -> tuple[Lengths, Lengths]:
        """(of a block, of a decoder)."""
        model = load_preset("deepmim_vit_b_12").model.replace(taps="even")
        layout = layout_of(model, 4)
        pipeline, memory = pipeline_of(model, layout), memory_of(model, layout, 1)
        whole = SchedulingProblem(pipeline, 8, times_of(model, layout, 1, 1.0), memory)
        rate = build_schedule("1f1b", whole).timeline.makespan / self.seconds
        found = times_of(model, layout, 1, rate, split=True).compute
        halves = 2 * model.depth // 4

        def lengths(kinds: tuple[Kind, Kind, Kind], count: int) -> Lengths:
            return Lengths(*(found[kind, 1] / count for kind in kinds))

        return (
            lengths(("forward", "encoder_backward", "encoder_weight_gradient"), halves),
            lengths(("decoder_forward", "decoder_backward", "decoder_weight_gradient"), 1),
        )

    def batches(self) -> list[Batch]:
        """The micro-batches of a step, the same on every rank."""
        model, generator = self.model, torch.Generator().manual_seed(0)
        size, side = (2 if self.kernels == "small" else 1), model.img_size
        return [
            Batch(
                torch.randn(size, 3, side, side, generator=generator),
                # Ranks of patches, which another framework can send as whole numbers.
                torch.rand(size, model.num_patches, generator=generator).argsort(1).float(),
            )
            for _ in range(self.num_microbatches)
        ]

    def times(self, layout: Layout, split: bool) -> Durations:
        """What our builders are told; in proportion to FLOPs where kernels compute."""
        if self.kernels != "sleep":
            return times_of(self.model, layout, 1, 1e12, split=split)
        block, decoder = self.lengths
        compute: dict[tuple[Kind, int], float] = {}
        for stage, cut in enumerate(layout):
            blocks, decoders = cut.last - cut.first, len(cut.decoders)
            later = 0.0 if split else 1.0  # weight gradients belong to the backward
            compute |= {
                ("forward", stage): blocks * block.forward,
                ("encoder_backward", stage): blocks
                * (block.input_gradient + later * block.weight_gradient),
                ("encoder_weight_gradient", stage): blocks * block.weight_gradient,
                ("decoder_forward", stage): decoders * decoder.forward,
                ("decoder_backward", stage): decoders
                * (decoder.input_gradient + later * decoder.weight_gradient),
                ("decoder_weight_gradient", stage): decoders * decoder.weight_gradient,
            }
            parts = ("decoder_forward", stage), ("decoder_backward", stage)
            compute["decoder", stage] = sum(compute[part] for part in parts)
        return Durations(compute, {})

    def with_kernels(self, stage: Stage) -> Stage:
        """The stage, its blocks and decoders sleeping where that is wanted."""
        if self.kernels == "sleep":
            block, decoder = self.lengths
            for key in stage.blocks:
                stage.blocks[key] = SleepingBlock(block)
            for key in stage.decoders:
                stage.decoders[key] = SleepingDecoder(decoder, self.model)
        return stage


class Slept:
    """How long this process has slept, s."""

    seconds = 0.0


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
    Slept.seconds += seconds


class _SleepOnInput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        _sleep(forward)
        ctx.seconds = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _sleep(ctx.seconds)
        return grad, None, None


class _SleepOnWeight(Function):
    """A node of the weight's own, so that every framework may run its backward apart."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, backward: float) -> Tensor:
        ctx.seconds, ctx.shape = backward, weight.shape
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        queue, seconds = current_queue(), ctx.seconds
        if queue is None:
            _sleep(seconds)
        else:
            queue.pending.append(lambda: _sleep(seconds))
        return grad.expand(ctx.shape).clone(), None


class SleepingBlock(nn.Module):
    """x [.., D] -> [.., D] after a while."""

    def __init__(self, lengths: Lengths) -> None:
        super().__init__()
        self._lengths = lengths
        # In proportion to the work: some frameworks balance stages by parameters.
        total = lengths.forward + lengths.input_gradient + lengths.weight_gradient
        self.weight = nn.Parameter(torch.zeros(max(1, int(1e4 * total))))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus a weight of zeros."""
        lengths = self._lengths
        x = _SleepOnInput.apply(x, lengths.forward, lengths.input_gradient)
        return x + _SleepOnWeight.apply(self.weight, lengths.weight_gradient)


class SleepingDecoder(nn.Module):
    """A decoder's shapes: feature [B, K+1, D] -> [B, L-K, P]."""

    def __init__(self, lengths: Lengths, config: ModelConfig) -> None:
        super().__init__()
        self.block = SleepingBlock(lengths)
        self.pred = nn.Linear(config.embed_dim, config.out_dim)
        nn.init.constant_(self.pred.weight, 0.01)
        nn.init.zeros_(self.pred.bias)
        self._num_masked = config.num_patches - config.num_visible

    def forward(self, feature: Tensor, *, masking: Masking, full: bool = False) -> Tensor:
        """Predictions of the masked patches."""
        first = self.block(feature)[:, :1]
        return self.pred(first.expand(-1, self._num_masked, -1))
