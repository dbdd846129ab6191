"""FLOPs, parameters and bytes of every part of a model, counted from its ModelConfig (no torch).

Legend: B images of a micro-batch, L patches, K visible patches, D encoder width, d decoder width,
S = L + 1 tokens of a decoder, C = K + 1 tokens of the encoder, o width of a prediction.

FLOPs are per image, 2 per multiply-accumulate, over matrix products and attention only, as torch's
FlopCounterMode counts them with unfused attention; norms, GELU and additions are left out. The
gradient with respect to inputs and the one with respect to weights are kept apart, because a
schedule may run them at different times; attention's two products have no weights, so their whole
backward belongs to the inputs.

Bytes are those of autocast (fp32 weights, gradients and residual stream, 16-bit products), the
default on GPUs, except where a precision is given.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from deepmim_scale.config import ModelConfig
from deepmim_scale.methods import method_of
from deepmim_scale.objectives import objective_of
from deepmim_scale.objectives.pixels import num_pixels
from deepmim_scale.pipeline.ir import Reduction

WeightGather = Literal["fp32", "16bit"]
"""How updated weights travel after a step."""
Recompute = Literal["none", "encoder", "all"]
"""What runs again in the backward pass instead of being kept."""


@dataclass(frozen=True)
class Cost:
    """What one part costs; parts add up with `+` and `total`, equal ones with `*`."""

    trainable: int = 0
    """Parameters that are trained."""
    frozen: int = 0
    """Position tables and MIRL's weight_g."""
    forward_flops: int = 0
    """Per image."""
    input_gradient_flops: int = 0
    """Per image, backward with respect to inputs."""
    weight_gradient_flops: int = 0
    """Per image, backward with respect to weights."""
    saved_values: int = 0
    """Activation values per image kept from forward to backward."""
    saved_residuals: int = 0
    """Of these, inputs (and a few results) of norms, which autocast leaves in fp32."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> Cost:
        return Cost(*(count * value for value in vars(self).values()))

    @property
    def parameters(self) -> int:
        """Trainable and frozen."""
        return self.trainable + self.frozen

    @property
    def backward_flops(self) -> int:
        """Per image, both gradients."""
        return self.input_gradient_flops + self.weight_gradient_flops

    @property
    def training_flops(self) -> int:
        """Per image, forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def activation_bytes(self) -> int:
        """Bytes per image kept from forward to backward under autocast."""
        return 2 * self.saved_values + 2 * self.saved_residuals


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of parts."""
    return sum(costs, start=Cost())


def _linear(tokens: int, inputs: int, outputs: int, bias: bool = True) -> Cost:
    flops = 2 * tokens * inputs * outputs
    parameters = inputs * outputs + bias * outputs
    return Cost(parameters, 0, flops, flops, flops)


def _attention(queries: int, keys: int, width: int) -> Cost:
    flops = 4 * queries * keys * width  # scores, and weights times values
    return Cost(forward_flops=flops, input_gradient_flops=2 * flops)


def _norm(width: int) -> Cost:
    return Cost(trainable=2 * width)


def block_cost(
    width: int, mlp_ratio: float, tokens: int, queries: int | None = None, context: int = 0
) -> Cost:
    """A pre-norm transformer block on `tokens` tokens.

    With `queries` given, only these tokens go through queries, projection and MLP (keys and values
    are made of all). With `context` > 0 the block cross-attends to so many tokens between
    self-attention and MLP (MIRL's CrossBlock).
    """
    queries = tokens if queries is None else queries
    hidden = int(width * mlp_ratio)
    parts = [
        _linear(queries, width, width),
        _linear(tokens, width, 2 * width),
        _attention(queries, tokens, width),
        _linear(queries, width, width),
        _linear(queries, width, hidden),
        _linear(queries, hidden, width),
        _norm(width),
        _norm(width),
    ]
    # Norm 1 and keys and values for all tokens; the rest for the queries.
    saved = 4 * width * tokens + (4 * width + 2 * hidden) * queries
    residuals = width * (tokens + queries)
    if queries < tokens:  # choosing some keeps norm 1's fp32 result too, and a copy of them
        saved += width * (tokens + queries)
        residuals += width * tokens
    if context:
        parts += [
            _linear(queries, width, width),
            _linear(context, width, 2 * width),
            _attention(queries, context, width),
            _linear(queries, width, width),
            _norm(width),
            _norm(width),
        ]
        saved += 4 * width * queries + 3 * width * context
        residuals += width * queries
    return total([*parts, Cost(saved_values=saved, saved_residuals=residuals)])


def encoder_block_cost(config: ModelConfig) -> Cost:
    """One encoder block on the visible tokens and CLS."""
    return block_cost(config.embed_dim, config.mlp_ratio, config.num_visible + 1)


def embedding_cost(config: ModelConfig) -> Cost:
    """Patch embedding of all L patches, CLS, position table; MIRL: low-level norm and embedding."""
    D, L = config.embed_dim, config.num_patches
    patch = _linear(L, num_pixels(config), D)
    cost = Cost(
        trainable=patch.trainable + D,
        frozen=(L + 1) * D,
        forward_flops=patch.forward_flops,
        input_gradient_flops=0,  # nobody needs the gradient of the image
        weight_gradient_flops=patch.weight_gradient_flops,
        saved_values=L * num_pixels(config),
    )
    if method_of(config).carries:
        cost += _norm(D) + _linear(config.num_visible + 1, D, config.decoder_embed_dim)
    return cost


def decoder_context(config: ModelConfig, index: int) -> int:
    """Tokens that decoder `index` (from 0) cross-attends to: all earlier segments and the input."""
    return (config.num_visible + 1) * (index + 1) if method_of(config).carries else 0


def tap_cost(config: ModelConfig) -> Cost:
    """What makes a decoder's input of a tap: embedding, and in MIRL the segment's own norm.

    MIRL's result is a carry, made in the encoder's forward, since deeper decoders need it too.
    """
    D, d, C = config.embed_dim, config.decoder_embed_dim, config.num_visible + 1
    embedding = _linear(C, D, d) + Cost(saved_values=C * D)
    return embedding + _norm(D) if method_of(config).carries else embedding


def _decoder_body_cost(config: ModelConfig, index: int) -> Cost:
    """Mask token, blocks, norm and head."""
    d, tokens = config.decoder_embed_dim, config.num_patches + 1
    context = decoder_context(config, index)
    queries = config.num_patches - config.num_visible if config.masked_query else tokens
    middle = block_cost(d, config.mlp_ratio, tokens, None, context)
    last = block_cost(d, config.mlp_ratio, tokens, queries, context)
    saved = 2 * d * queries + config.out_dim * queries + d * context
    parts = [
        middle * (config.decoder_depth - 1),
        last,
        _norm(d),
        _linear(queries, d, config.out_dim),
        Cost(trainable=d, saved_values=saved, saved_residuals=d * queries),
    ]
    weight_g = Cost(frozen=d if method_of(config).carries else 0)
    return total(parts) + weight_g


def decoder_cost(config: ModelConfig, index: int) -> Cost:
    """Decoder `index` (from 0): embedding of its tap, mask token, blocks, norm, head.

    Its position table is counted apart, by `position_table_cost`, as decoders of MAE and DeepMIM
    share one.
    """
    return tap_cost(config) + _decoder_body_cost(config, index)


def teacher_cost(config: ModelConfig) -> Cost:
    """Forward of the target's teacher, if it has one, on whole images."""
    size = objective_of(config).teacher_size(config)
    if size is None:
        return Cost()
    width, tokens, out = size.width, size.num_tokens, size.out_dim
    parts = [
        _linear(config.num_patches, num_pixels(config), width, bias=False),
        block_cost(width, size.mlp_ratio, tokens) * size.depth,
        _linear(tokens, width, out, bias=False) if out else Cost(),
        _norm(width) * 2,
        Cost(trainable=width + width * tokens),  # CLS and position table
    ]
    whole = total(parts)
    return Cost(frozen=whole.parameters, forward_flops=whole.forward_flops)


def position_table_cost(config: ModelConfig) -> Cost:
    """One decoder position table, frozen."""
    return Cost(frozen=(config.num_patches + 1) * config.decoder_embed_dim)


@dataclass(frozen=True)
class StageCost:
    """Encoder slice and decoders of one stage, and the frozen teacher that runs beside them."""

    encoder: Cost
    decoders: Cost
    teacher: Cost

    @cached_property
    def whole(self) -> Cost:
        """What is trained: encoder and decoders."""
        return self.encoder + self.decoders

    @cached_property
    def executed(self) -> Cost:
        """All that the stage holds and runs: the teacher too."""
        return self.whole + self.teacher


@cache
def stage_cost(config: ModelConfig, first: int, last: int) -> StageCost:
    """Blocks `first`..`last` - 1 (from 0) and the decoders whose taps are among them.

    The first stage has the patch embedding, the last one the encoder's final norm (MIRL: one of the
    norms of its taps). Each stage with decoders has its own position table, and the teacher once.
    """
    encoder = encoder_block_cost(config) * (last - first)
    if first == 0:
        encoder += embedding_cost(config)
    if last == config.depth and not method_of(config).carries:
        hidden = (config.num_visible + 1) * config.embed_dim
        encoder += _norm(config.embed_dim) + Cost(saved_values=hidden, saved_residuals=hidden)
    indices = [index for index, tap in enumerate(config.taps) if first < tap <= last]
    if method_of(config).carries:
        encoder += tap_cost(config) * len(indices)
        decoders = [_decoder_body_cost(config, k) + position_table_cost(config) for k in indices]
    else:
        decoders = [decoder_cost(config, k) for k in indices]
        decoders += [position_table_cost(config)] if indices else []
    return StageCost(encoder, total(decoders), teacher_cost(config) if indices else Cost())


def model_cost(config: ModelConfig) -> StageCost:
    """The whole model, as one stage."""
    return stage_cost(config, 0, config.depth)


def zero2_state_bytes(cost: StageCost, replicas: int, reduction: Reduction = "coalesced") -> int:
    """Bytes per process of weights, gradients and optimizer of a stage under ZeRO-2 and autocast.

    fp32 weights (the teacher's too) and the 16-bit copy of the trained ones that autocast keeps
    during a step; optimizer 12 bytes per parameter (fp32 master weights and two AdamW moments), a
    1/replicas part on each process. Gradients are sharded too with `per_microbatch`, whole until
    the flush with `coalesced`. Communication buckets are not counted.
    """
    trainable = cost.whole.trainable
    gradients = -(-trainable // (replicas if reduction == "per_microbatch" else 1))
    weights = 4 * cost.executed.parameters + 2 * trainable
    return weights + 4 * gradients + 12 * -(-trainable // replicas)


def state_bytes(cost: StageCost, replicas: int, *, zero3: bool, pure: bool) -> int:
    """`zero2_state_bytes`, with all of it in shards (ZeRO-3), or with 16-bit weights and gradients.

    Weights that ZeRO-3 has gathered for the block that runs are not counted.
    """
    trainable = cost.whole.trainable
    kept = (2 if pure else 4) * (cost.executed.parameters - trainable)
    weights, gradients = (2, 2) if pure else (6, 4)
    if zero3:
        return kept + -(-trainable // replicas) * (weights + gradients + 12)
    return kept + trainable * (weights + gradients) + 12 * -(-trainable // replicas)


def recomputed_flops(config: ModelConfig, recompute: Recompute) -> int:
    """FLOPs per image that recomputation adds: the encoder runs again, or decoders too."""
    cost = model_cost(config)
    again = {"none": [], "encoder": [cost.encoder], "all": [cost.encoder, cost.decoders]}
    return sum(part.forward_flops for part in again[recompute])


def local_activation_bytes(config: ModelConfig, recompute: Recompute, pure: bool) -> int:
    """Bytes per image that one stage keeps with local backward: the encoder, and one decoder."""
    each = 2 if pure else 4
    hidden = (config.num_visible + 1) * config.embed_dim * each
    block, largest = encoder_block_cost(config), max_decoder_cost(config)
    encoder = model_cost(config).encoder
    taps = hidden * len(config.taps)
    kept = _saved_bytes(encoder, pure)
    if recompute != "none":
        # The input of each block, and one block whole while it runs again.
        kept = hidden * config.depth + _saved_bytes(block, pure)
    decoder = _saved_bytes(largest, pure)
    if recompute == "all":
        decoder = hidden + decoder  # a decoder is one unit: whole while it runs again
    return kept + taps + decoder


def max_decoder_cost(config: ModelConfig) -> Cost:
    """The decoder that keeps most."""
    costs = [decoder_cost(config, index) for index in range(len(config.taps))]
    return max(costs, key=lambda cost: cost.activation_bytes)


def _saved_bytes(cost: Cost, pure: bool) -> int:
    return 2 * cost.saved_values if pure else cost.activation_bytes


def gradient_traffic_bytes(cost: StageCost, replicas: int) -> int:
    """Bytes that a process sends to sum its 16-bit gradients once: each to its owner alone."""
    return round((replicas - 1) / replicas * cost.whole.trainable * 2)


def weight_traffic_bytes(cost: StageCost, replicas: int, gather: WeightGather = "fp32") -> int:
    """Bytes that a process sends to gather the weights that their owners have updated."""
    return round((replicas - 1) / replicas * cost.whole.trainable * (4 if gather == "fp32" else 2))
