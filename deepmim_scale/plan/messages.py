"""What crosses between stages: one truth for the planner's bytes and the shapes that are received.

Legend: B images, K visible, L patches, D and d widths, P prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepmim_scale.config import ModelConfig
from deepmim_scale.methods import method_of
from deepmim_scale.methods.base import TensorSpec, prediction
from deepmim_scale.pipeline.ir import Payload
from deepmim_scale.plan.partition import Layout
from deepmim_scale.precision import BYTES, Precision


def message_tensors(
    model: ModelConfig, layout: Layout, payload: Payload, source: int, target: int
) -> tuple[TensorSpec, ...]:
    """The tensors of one image in a message, in order; a gradient has the shape of its tensor.

    Under autocast the hidden state is the residual stream in fp32: it travels as it is, so that a
    boundary changes no bit. Carries and predictions come out of 16-bit matrix products.
    """
    if payload in ("prediction", "prediction_gradient"):
        shallow = layout[min(source, target)]
        return (prediction(model),) * len(shallow.decoders)
    return method_of(model).boundary(model, layout[max(source, target)].first)


def dtype_of(spec: TensorSpec, precision: Precision) -> str:
    """Type of a message's tensor, as torch names it."""
    return precision.residual if spec.role == "residual" else precision.product


def num_bytes(specs: Sequence[TensorSpec], precision: Precision) -> int:
    """Bytes of one image's tensors."""
    total = 0
    for spec in specs:
        values = 1
        for size in spec.shape:
            values *= size
        total += values * BYTES[dtype_of(spec, precision)]
    return total


@dataclass(frozen=True)
class Transfer:
    """What one micro-batch sends from one stage to another."""

    payload: Payload
    source: int
    target: int
    num_bytes: int


def transfers_of(
    model: ModelConfig, layout: Layout, microbatch: int, precision: Precision = Precision.BFLOAT16
) -> list[Transfer]:
    """All messages of a micro-batch of so many images, those within a rank included."""
    ways: list[tuple[Payload, int, int]] = []
    for deeper in range(1, len(layout)):
        ways += [("activation", deeper - 1, deeper), ("gradient", deeper, deeper - 1)]
    if method_of(model).paired:
        for shallow in range(len(layout) // 2):
            deep = len(layout) - 1 - shallow
            ways += [("prediction", shallow, deep), ("prediction_gradient", deep, shallow)]
    return [
        Transfer(*way, microbatch * num_bytes(message_tensors(model, layout, *way), precision))
        for way in ways
    ]
