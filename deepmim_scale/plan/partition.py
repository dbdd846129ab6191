"""Cuts the encoder into stages: exact dynamic programming, or a layout string from the user.

A decoder always lives on the stage of the block that it taps, so a layout is a list of cuts between
blocks. Legend: P stages, n blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError
from deepmim_scale.methods import method_of
from deepmim_scale.plan.cost import StageCost, stage_cost


@dataclass(frozen=True)
class BlockRange:
    """Blocks `first`..`last` - 1 (from 0) and the decoders (indices from 0) after them."""

    first: int
    last: int
    decoders: tuple[int, ...]


Layout = tuple[BlockRange, ...]


def stages_at(config: ModelConfig, cuts: Sequence[int]) -> Layout:
    """Stages that end after the given numbers of blocks, the last being the depth."""
    return tuple(
        BlockRange(a, b, tuple(k for k, tap in enumerate(config.taps) if a < tap <= b))
        for a, b in zip([0, *cuts[:-1]], cuts, strict=True)
    )


def minimax_cuts(
    num_blocks: int,
    num_stages: int,
    cost: Callable[[int, int], float],
    fits: Callable[[int, int, int], bool] = lambda stage, first, last: True,
) -> tuple[int, ...] | None:
    """Cuts that make the most expensive stage cheapest; exact, O(P n^2).

    `cost(first, last)` of the blocks between; `fits(stage, first, last)` says whether the stage of
    that number has the memory for them. None where no cut fits.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        left = num_stages - 1 - stage
        ends = range(stage + 1, num_blocks - left + 1) if left else [num_blocks]
        best = {
            last: min(
                (max(worst, cost(first, last)), (*cuts, last))
                for first, (worst, cuts) in best.items()
                if first < last and fits(stage, first, last)
            )
            for last in ends
            if any(first < last and fits(stage, first, last) for first in best)
        }
    return best[num_blocks][1] if num_blocks in best else None


def partition(
    config: ModelConfig,
    num_stages: int,
    stage_bytes: Callable[[int, StageCost], float] = lambda stage, cost: 0.0,
    memory_limit: float = math.inf,
    seconds: Callable[[int, int], float] | None = None,
) -> Layout:
    """The layout whose slowest stage runs the fewest FLOPs (the teacher's too) under a memory cap.

    `seconds(first, last)` of the work on blocks replaces the FLOPs.
    `stage_bytes(stage, cost)` is what a stage of that number needs. MIRL is cut into equal runs of
    segments. Raises UserError when no layout fits.
    """
    if method_of(config).paired:  # stages hold whole segments, so that pairs of stages are pairs
        run = config.depth // num_stages
        return stages_at(config, range(run, config.depth + 1, run))

    cuts = minimax_cuts(
        config.depth,
        num_stages,
        seconds or (lambda first, last: stage_cost(config, first, last).executed.training_flops),
        lambda stage, first, last: (
            stage_bytes(stage, stage_cost(config, first, last)) <= memory_limit
        ),
    )
    if cuts is None:
        raise UserError(
            f"stages={num_stages}: no cut of {config.depth} blocks fits {memory_limit / 2**30:.1f} "
            "GiB; use more stages, more replicas or a smaller microbatch_size"
        )
    return stages_at(config, cuts)


def format_layout(layout: Layout, config: ModelConfig) -> str:
    """Readable form: `6d/2d/2d/2d` is 6 blocks and a decoder, then three times 2 and one."""
    texts = []
    for stage in layout:
        ends = sorted({config.taps[k] for k in stage.decoders} | {stage.last})
        starts = [stage.first, *ends[:-1]]
        texts.append(
            "".join(
                f"{end - start}{'d' if end in config.taps else ''}"
                for start, end in zip(starts, ends, strict=True)
            )
        )
    return "/".join(texts)


def parse_layout(text: str, config: ModelConfig) -> Layout:
    """Read a layout string; UserError unless blocks and decoders are those of the model.

    Stages may also be separated by `|`, as older files have it; to a shell that is a pipe.
    """
    cuts: list[int] = []
    taps: list[int] = []
    block = 0
    for part in re.split("[/|]", text):
        if not re.fullmatch(r"(\d+d)*\d+d?", part):
            example = format_layout(stages_at(config, [config.depth]), config)
            raise UserError(
                f"layout={text}: '{part}' is no stage; write numbers of blocks, each followed by d "
                f"where a decoder taps it, stages separated by /; on one stage it is {example}"
            )
        for blocks, decoder in re.findall(r"(\d+)(d?)", part):
            block += int(blocks)
            taps += [block] if decoder else []
        cuts.append(block)
    if block != config.depth or any(a >= b for a, b in zip([0, *cuts], cuts, strict=False)):
        raise UserError(
            f"layout={text}: adds up to {block} blocks in {len(cuts)} stages; must be "
            f"depth={config.depth} with at least one block in each stage"
        )
    if tuple(taps) != config.taps:
        raise UserError(
            f"layout={text}: decoders after blocks {taps}, but taps={list(config.taps)}; "
            f"write {format_layout(stages_at(config, cuts), config)}"
        )
    layout = stages_at(config, cuts)
    if method_of(config).paired and layout != partition(config, len(cuts)):
        raise UserError(
            f"layout={text}: {config.method} needs equal runs of segments; leave layout out"
        )
    return layout
