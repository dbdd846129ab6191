"""How long instructions take: in proportion to FLOPs, or as fitted to measured runs.

A fitted instruction on a micro-batch of B images lasts

    B * FLOPs * a + blocks * b + B * c,

where a is the inverse of a rate, b what launching a block costs and c what is done for each image
beside its matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepmim_scale.config import ModelConfig
from deepmim_scale.pipeline.ir import Kind
from deepmim_scale.plan.cost import StageCost, stage_cost

Features = tuple[float, float, float]
"""B * FLOPs, blocks, B."""
Split = bool
"""Whether weight gradients are instructions of their own."""


def is_decoder(kind: Kind) -> bool:
    """Whether an instruction is one of decoders, not of the encoder."""
    return kind.startswith("decoder")


def flops_by_kind(cost: StageCost, split: Split) -> dict[Kind, int]:
    """FLOPs per image of a stage's instructions; the teacher runs where losses are evaluated."""
    encoder, decoders = cost.encoder, cost.decoders
    flops: dict[Kind, int] = {
        "forward": encoder.forward_flops,
        "encoder_backward": encoder.input_gradient_flops if split else encoder.backward_flops,
        "encoder_weight_gradient": encoder.weight_gradient_flops,
        "decoder_forward": decoders.forward_flops,
        "decoder_backward": cost.teacher.forward_flops
        + (decoders.input_gradient_flops if split else decoders.backward_flops),
        "decoder_weight_gradient": decoders.weight_gradient_flops,
    }
    flops["decoder"] = flops["decoder_forward"] + flops["decoder_backward"]
    return flops


def features(
    model: ModelConfig, first: int, last: int, size: int, split: Split
) -> dict[Kind, Features]:
    """What the time of a stage's instructions depends on, for micro-batches of `size` images."""
    num_decoders = sum(first < tap <= last for tap in model.taps)
    blocks = {False: last - first, True: num_decoders * model.decoder_depth}
    return {
        kind: (float(size * flops), float(blocks[is_decoder(kind)]), float(size))
        for kind, flops in flops_by_kind(stage_cost(model, first, last), split).items()
    }


@dataclass(frozen=True)
class Calibration:
    """Coefficients (a, b, c) of the instructions that runs have executed."""

    coefficients: Mapping[tuple[Kind, Split], Features]
    seconds_per_flop: Mapping[bool, float]
    """Of the encoder (False) and of decoders (True), for kinds that no run has executed."""

    def seconds(self, kind: Kind, split: Split, values: Features) -> float:
        """What an instruction takes."""
        for key in ((kind, split), (kind, not split)):
            if key in self.coefficients and values[0]:
                return sum(a * b for a, b in zip(self.coefficients[key], values, strict=True))
        return values[0] * self.seconds_per_flop[is_decoder(kind)]

    def of_stage(
        self, model: ModelConfig, first: int, last: int, size: int, split: Split
    ) -> dict[Kind, float]:
        """Seconds of a stage's instructions for micro-batches of `size` images."""
        found = features(model, first, last, size, split)
        return {kind: self.seconds(kind, split, values) for kind, values in found.items()}

    def whole(self, model: ModelConfig, first: int, last: int, size: int) -> float:
        """Seconds of all work of a stage on one micro-batch."""
        each = self.of_stage(model, first, last, size, split=False)
        return each["forward"] + each["decoder"] + each["encoder_backward"]
