"""FLOPs, parameters and bytes of every part of a model, counted from its ModelConfig (no torch).

Legend: B images of a micro-batch, L patches, K visible patches, D encoder width, d decoder width,
S = L + 1 tokens of a decoder, C = K + 1 tokens of the encoder, o width of a prediction.

FLOPs are per image, 2 per multiply-accumulate, over matrix products and attention only, as torch's
FlopCounterMode counts them with unfused attention; norms, GELU and additions are left out. The
gradient with respect to inputs and the one with respect to weights are kept apart, because a
schedule may run them at different times; attention's two products have no weights, so their whole
backward belongs to the inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from deepmim_scale.config import ModelConfig

Precision = Literal["autocast", "pure16", "fp32"]
"""autocast: fp32 weights and gradients, 16-bit activations; pure16: 16-bit weights too."""
Reduction = Literal["coalesced", "per_microbatch"]

SAVED_PER_BLOCK = 16
"""Saved values per token and channel of a pre-norm block with mlp_ratio 4 and fused attention:
both norms' inputs and outputs 4, qkv 3, attention output 1, MLP hidden before and after GELU 8."""


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

    def activation_bytes(self, precision: Precision = "autocast") -> int:
        """Bytes per image kept from forward to backward."""
        return self.saved_values * activation_width(precision)


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of parts."""
    return sum(costs, start=Cost())


def activation_width(precision: Precision) -> int:
    """Bytes of one activation value."""
    return 4 if precision == "fp32" else 2


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
    return total([*parts, Cost(saved_values=saved)])


def encoder_block_cost(config: ModelConfig) -> Cost:
    """One encoder block on the visible tokens and CLS."""
    return block_cost(config.embed_dim, config.mlp_ratio, config.num_visible + 1)


def embedding_cost(config: ModelConfig) -> Cost:
    """Patch embedding of all L patches, CLS, position table; MIRL: low-level norm and embedding."""
    D, L = config.embed_dim, config.num_patches
    patch = _linear(L, config.in_chans * config.patch_size**2, D)
    cost = Cost(
        trainable=patch.trainable + D,
        frozen=(L + 1) * D,
        forward_flops=patch.forward_flops,
        input_gradient_flops=0,  # nobody needs the gradient of the image
        weight_gradient_flops=patch.weight_gradient_flops,
        saved_values=L * config.in_chans * config.patch_size**2,
    )
    if config.method == "mirl":
        cost += _norm(D) + _linear(config.num_visible + 1, D, config.decoder_embed_dim)
    return cost


def decoder_context(config: ModelConfig, index: int) -> int:
    """Tokens that decoder `index` (from 0) cross-attends to: all earlier segments and the input."""
    return (config.num_visible + 1) * (index + 1) if config.method == "mirl" else 0


def tap_cost(config: ModelConfig) -> Cost:
    """What makes a decoder's input of a tap: embedding, and in MIRL the segment's own norm.

    MIRL's result is a carry, made in the encoder's forward, since deeper decoders need it too.
    """
    D, d, C = config.embed_dim, config.decoder_embed_dim, config.num_visible + 1
    embedding = _linear(C, D, d) + Cost(saved_values=C * D)
    return embedding + _norm(D) if config.method == "mirl" else embedding


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
        Cost(trainable=d, saved_values=saved),
    ]
    weight_g = Cost(frozen=d if config.method == "mirl" else 0)
    return total(parts) + weight_g


def decoder_cost(config: ModelConfig, index: int) -> Cost:
    """Decoder `index` (from 0): embedding of its tap, mask token, blocks, norm, head.

    Its position table is counted apart, by `position_table_cost`, as decoders of MAE and DeepMIM
    share one.
    """
    return tap_cost(config) + _decoder_body_cost(config, index)


def position_table_cost(config: ModelConfig) -> Cost:
    """One decoder position table, frozen."""
    return Cost(frozen=(config.num_patches + 1) * config.decoder_embed_dim)


@dataclass(frozen=True)
class StageCost:
    """Encoder slice and decoders of one stage."""

    encoder: Cost
    decoders: Cost

    @cached_property
    def whole(self) -> Cost:
        """Both."""
        return self.encoder + self.decoders


@cache
def stage_cost(config: ModelConfig, first: int, last: int) -> StageCost:
    """Blocks `first`..`last` - 1 (from 0) and the decoders whose taps are among them.

    The first stage has the patch embedding, the last one the encoder's final norm (MIRL: one of the
    norms of its taps). Each stage with decoders has its own position table.
    """
    encoder = encoder_block_cost(config) * (last - first)
    if first == 0:
        encoder += embedding_cost(config)
    if last == config.depth and config.method != "mirl":
        encoder += _norm(config.embed_dim)
    indices = [index for index, tap in enumerate(config.taps) if first < tap <= last]
    if config.method == "mirl":
        encoder += tap_cost(config) * len(indices)
        decoders = [_decoder_body_cost(config, k) + position_table_cost(config) for k in indices]
    else:
        decoders = [decoder_cost(config, k) for k in indices]
        decoders += [position_table_cost(config)] if indices else []
    return StageCost(encoder, total(decoders))


def model_cost(config: ModelConfig) -> StageCost:
    """The whole model, as one stage."""
    return stage_cost(config, 0, config.depth)


def segment_of(config: ModelConfig, block: int) -> int:
    """MIRL: number (from 0) of the segment of block `block` (from 0)."""
    return block * config.num_segments // config.depth


def boundary_bytes(config: ModelConfig, block: int, precision: Precision = "autocast") -> int:
    """Bytes per image and direction across a boundary before block `block` (from 0).

    The hidden state [C, D]; MIRL adds the carries e_0..e_g of g earlier segments, [C, d] each
    (for a boundary at a segment's end). The backward direction returns their gradients. Under
    autocast the hidden state is the fp32 residual stream and travels as it is, so that a boundary
    changes no bit; carries come out of 16-bit products.
    """
    carries = segment_of(config, block) + 1 if config.method == "mirl" else 0
    hidden = config.embed_dim * (2 if precision == "pure16" else 4)
    carried = carries * config.decoder_embed_dim * activation_width(precision)
    return (config.num_visible + 1) * (hidden + carried)


def prediction_values(config: ModelConfig) -> int:
    """Values per image of one prediction: [L - K, o], the masked patches only."""
    return (config.num_patches - config.num_visible) * config.out_dim


def zero2_state_bytes(
    cost: Cost,
    replicas: int,
    precision: Precision = "autocast",
    reduction: Reduction = "coalesced",
) -> int:
    """Bytes per process of weights, gradients and optimizer under ZeRO-2.

    Optimizer: 12 bytes per parameter (fp32 master weights and two AdamW moments), a 1/replicas part
    on each process. Gradients are sharded too with `per_microbatch`, whole until the flush with
    `coalesced`. With pure 16-bit weights and `per_microbatch` this is 2P + 14P/N of the ZeRO paper.
    Communication buckets are not counted.
    """
    width = 2 if precision == "pure16" else 4
    shards = replicas if reduction == "per_microbatch" else 1
    gradients = width * -(-cost.trainable // shards)
    return width * cost.parameters + gradients + 12 * -(-cost.trainable // replicas)
