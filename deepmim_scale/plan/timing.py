"""From a model and a layout to what schedules are made of: pipeline, times, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from deepmim_scale.config import ModelConfig
from deepmim_scale.methods import method_of
from deepmim_scale.methods.base import Placement
from deepmim_scale.pipeline.ir import Durations, Kind, Payload, Pipeline
from deepmim_scale.pipeline.simulate import Memory
from deepmim_scale.plan.cost import Cost, StageCost, decoder_cost, stage_cost
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.partition import Layout, partition
from deepmim_scale.plan.rates import Calibration, flops_by_kind

MAX_PIECES = 8
"""Of a part of a stage whose gradients are summed one after another."""
PIECE_PARAMETERS = 4_000_000
"""A piece has at least so many (8 MB in 16 bits): each costs a few launches and messages."""


def num_pieces(num_units: int, num_parameters: int) -> int:
    """Pieces of a part of so many half blocks or decoders."""
    return max(1, min(MAX_PIECES, num_units, num_parameters // PIECE_PARAMETERS))


def layout_of(
    model: ModelConfig,
    num_ranks: int,
    placement: Placement = "linear",
    stage_bytes: Callable[[int, StageCost], float] = lambda stage, cost: 0.0,
    memory_limit: float = float("inf"),
    seconds: Callable[[int, int], float] | None = None,
) -> Layout:
    """Stages of a pipeline of `num_ranks`: on the V two per rank, one segment each.

    They are cut by FLOPs, or by the `seconds` of all work between two blocks.
    """
    folded = placement == "v" and num_ranks > 1
    return partition(model, num_ranks * (2 if folded else 1), stage_bytes, memory_limit, seconds)


def pipeline_of(
    model: ModelConfig,
    layout: Layout,
    placement: Placement = "linear",
    gradient_flow: str = "full",
) -> Pipeline:
    """The stage graph; a single stage is linear whatever its placement."""
    folded = placement == "v" and len(layout) > 1
    return Pipeline(
        num_ranks=len(layout) // 2 if folded else len(layout),
        decoders=tuple(bool(stage.decoders) for stage in layout),
        placement="v" if folded else "linear",
        paired=method_of(model).paired,
        local_gradients=gradient_flow == "local",
    )


def times_of(
    model: ModelConfig,
    layout: Layout,
    microbatch: int,
    flops_per_second: float,
    seconds_per_byte: Callable[[int, int], float] = lambda source, target: 0.0,
    latency: Callable[[int, int], float] = lambda source, target: 0.0,
    *,
    split: bool = False,
    reduction: Callable[[StageCost], float] = lambda part: 0.0,
    lanes: Callable[[int, int], tuple[str, ...]] = lambda source, target: (),
    calibration: Calibration | None = None,
) -> Durations:
    """Durations in proportion to FLOPs, and transfers to bytes (autocast) and latency.

    With `split` the backward kinds stand for gradients with respect to inputs only. The teacher
    runs where a stage's first loss is evaluated, once for all its decoders. `reduction` gives
    the seconds to sum the gradients of a part over the replicas, `lanes` what a message from one
    stage to another shares with others. A `calibration` replaces the rate.
    """
    pieces: dict[tuple[Kind, int], int] = {}
    compute: dict[tuple[Kind, int], float] = {}
    for index, stage in enumerate(layout):
        cost = stage_cost(model, stage.first, stage.last)
        encoder, decoders = cost.encoder, cost.decoders
        compute["reduce_encoder", index] = reduction(StageCost(encoder, Cost(), Cost()))
        compute["reduce_decoders", index] = reduction(StageCost(Cost(), decoders, Cost()))
        halves = 2 * (stage.last - stage.first)
        pieces["reduce_encoder", index] = num_pieces(halves, encoder.trainable)
        pieces["reduce_decoders", index] = num_pieces(len(stage.decoders), decoders.trainable)
        seconds: Mapping[Kind, float] = (
            calibration.of_stage(model, stage.first, stage.last, microbatch, split)
            if calibration
            else {
                kind: microbatch * flops / flops_per_second
                for kind, flops in flops_by_kind(cost, split).items()
            }
        )
        compute |= {(kind, index): value for kind, value in seconds.items()}
    messages = transfers_of(model, layout, microbatch)
    shared: dict[tuple[Payload | None, int | None], tuple[str, ...]] = {
        (m.payload, m.source): lanes(m.source, m.target) for m in messages
    }
    transfer: dict[tuple[Payload | None, int | None], float] = {
        (message.payload, message.source): latency(message.source, message.target)
        + message.num_bytes * seconds_per_byte(message.source, message.target)
        for message in messages
    }
    return Durations(compute, transfer, shared, pieces)


def profiled_times(measured: Mapping[tuple[Kind, int], float], predicted: Durations) -> Durations:
    """Predicted times with measured seconds in their place, to rebuild a schedule from a profile.

    A kind that was not run (`decoder` where the profile has `decoder_forward` and
    `decoder_backward`, or the reverse) is predicted, times what the kinds of the same part and
    stage took against their prediction. Both must have weight gradients apart, or neither.
    """

    def part(key: tuple[Kind, int]) -> tuple[bool, int]:
        return key[0].startswith("decoder"), key[1]

    found: dict[tuple[bool, int], float] = defaultdict(float)
    expected: dict[tuple[bool, int], float] = defaultdict(float)
    for key, seconds in measured.items():
        found[part(key)] += seconds
        expected[part(key)] += predicted.compute[key]
    compute = {
        key: measured.get(key, seconds * found[part(key)] / (expected[part(key)] or 1.0))
        for key, seconds in predicted.compute.items()
    }
    return replace(predicted, compute=compute)


def memory_of(model: ModelConfig, layout: Layout, microbatch: int) -> list[Memory]:
    """Activation bytes of one micro-batch on each stage under autocast.

    The gradient of each tap, in fp32 as the hidden state, waits for the encoder's backward and is
    counted with the encoder.
    """
    transfers = transfers_of(model, layout, microbatch)
    tap_gradient = 4 * (model.num_visible + 1) * model.embed_dim
    found: list[Memory] = []
    for stage in layout:
        cost = stage_cost(model, stage.first, stage.last)
        each = [decoder_cost(model, k).activation_bytes for k in stage.decoders]
        messages = {m.payload: m.num_bytes for m in transfers if m.target == len(found)}
        found.append(
            Memory(
                microbatch * (cost.encoder.activation_bytes + tap_gradient * len(each)),
                microbatch * cost.decoders.activation_bytes,
                microbatch * max(each, default=0),
                messages,
            )
        )
    return found
