"""What a method decides: taps, decoders, losses, what crosses a boundary, how it may be cut.

A method is data and a few small functions of a model's configuration. The modules in `models/`,
the planner and the schedules read it and never ask for its name. No torch here.
Legend: L patches, K visible patches, D encoder width, d decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from deepmim_scale.config import ModelConfig

Placement = Literal["linear", "v"]
"""linear: stage r on rank r; v: stages r and 2P - 1 - r on rank r of P."""


@dataclass(frozen=True)
class Loss:
    """One term of the total loss."""

    name: str
    decoders: tuple[str, ...]
    """Names of the decoders whose predictions it sums."""
    weight: float
    """Factor in the total."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an image that another stage needs."""

    shape: tuple[int, ...]
    """Without the batch axis."""
    role: Literal["residual", "product"]
    """Part of the residual stream, or made by a matrix product: autocast types them apart."""


@dataclass(frozen=True)
class Combination:
    """A placement of stages with the numbers of ranks that it allows."""

    placement: Placement
    num_stages: Callable[[ModelConfig], Sequence[int]]


class Method(Protocol):
    """A way to pre-train; see `mae.py` for the smallest one."""

    name: str
    source: str
    """Repository of the official code, whose recipe the presets follow."""
    paired: bool
    """A loss sums the predictions of two decoders, which may lie on different stages."""
    carries: bool
    """Decoders read all earlier segments: the encoder's state takes one tensor of each along."""
    local_gradients: bool
    """Training without gradients across boundaries is defined: every stage has a loss."""
    free_taps: bool
    """The user chooses the tapped blocks; else they follow from the depth."""
    combinations: tuple[Combination, ...]

    def taps(self, depth: int, num_segments: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Tapped blocks (from 1) for the `wanted` ones; ValueError if they cannot be had.

        A single negative number -N asks for N taps spread evenly, or for the method's own.
        """
        ...

    def check(self, model: ModelConfig) -> None:
        """ValueError for what this method does not allow."""
        ...

    def decoder_names(self, model: ModelConfig) -> tuple[str, ...]:
        """A name for each tap."""
        ...

    def losses(self, model: ModelConfig) -> tuple[Loss, ...]:
        """All terms of the total loss, in their order."""
        ...

    def boundary(self, model: ModelConfig, block: int) -> tuple[TensorSpec, ...]:
        """The encoder's state before block `block` (from 0), as it crosses between stages."""
        ...

    def official_prefixes(self, model: ModelConfig) -> dict[str, str]:
        """Our module names -> those of the method's release, where they differ."""
        ...


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """ValueError `key=value: rule` unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}={value}: {rule}")


def require_divisible(key: str, value: int, name: str, divisor: int) -> None:
    """ValueError that offers the nearest multiples of the divisor."""
    lower = value // divisor * divisor
    near = f"{lower} or {lower + divisor}" if lower else str(divisor)
    require(value % divisor == 0, key, value, f"must be divisible by {name}={divisor}; e.g. {near}")


def even_taps(depth: int, num_taps: int) -> tuple[int, ...]:
    """Block numbers (from 1) that cut `depth` blocks into `num_taps` equal runs."""
    return tuple(round(depth * k / num_taps) for k in range(1, num_taps + 1))


def follow_depth(wanted: tuple[int, ...], expected: tuple[int, ...], rule: str) -> tuple[int, ...]:
    """`expected` where the user wants nothing else; ValueError if he does."""
    asks_for_even = len(wanted) == 1 and wanted[0] < 0
    if not asks_for_even and wanted != expected:
        raise ValueError(f"taps={wanted}: {rule}: use {expected} or leave taps out")
    return expected


def block_names(model: ModelConfig) -> tuple[str, ...]:
    """Decoders named by the block that they tap."""
    return tuple(f"block{block:02d}" for block in model.taps)


def own_losses(model: ModelConfig) -> tuple[Loss, ...]:
    """One loss for each decoder of `block_names`; the total is their sum."""
    return tuple(Loss(name, (name,), 1.0) for name in block_names(model))


def residual_stream(model: ModelConfig) -> TensorSpec:
    """The encoder's hidden state [K+1, D] of one image."""
    return TensorSpec((model.num_visible + 1, model.embed_dim), "residual")


def hidden_state(model: ModelConfig, block: int) -> tuple[TensorSpec, ...]:
    """What crosses before any block where decoders read their own tap only."""
    return (residual_stream(model),)


def prediction(model: ModelConfig) -> TensorSpec:
    """One decoder's prediction [L-K, P] of the masked patches of one image."""
    return TensorSpec((model.num_patches - model.num_visible, model.out_dim), "product")


def any_cut(model: ModelConfig) -> Sequence[int]:
    """A stage needs at least one block."""
    return range(1, model.depth + 1)


def decoder_prefixes(names: Sequence[str], numbers: Sequence[str]) -> dict[str, str]:
    """Official module names of decoders that have a number each (empty for a single one)."""
    prefixes = {}
    for name, number in zip(names, numbers, strict=True):
        prefixes[f"decoders.{name}.mask_token"] = f"mask_token{number}"
        for part in ("blocks", "norm", "pred"):
            prefixes[f"decoders.{name}.{part}"] = f"decoder_{part}{number}"
    return prefixes
