"""Which method, placement, stages, schedule and reduction go together; everything else is refused.

Legend: P stages as the user counts them (ranks of the pipeline).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepmim_scale.config import ModelConfig
from deepmim_scale.errors import UserError

BOTH = ("coalesced", "per_microbatch")
WHOLE = ("gpipe", "1f1b", "dib")


@dataclass(frozen=True)
class Row:
    """One row of the table of legal combinations."""

    methods: tuple[str, ...]
    placement: str
    stages: Callable[[ModelConfig], list[int]]
    schedules: tuple[str, ...]
    reductions: tuple[str, ...]


def _up_to_depth(model: ModelConfig) -> list[int]:
    return list(range(1, model.depth + 1))


def _folded(model: ModelConfig) -> list[int]:
    return sorted({1, model.num_segments // 2})


def _divisors(model: ModelConfig) -> list[int]:
    return [n for n in range(1, model.num_segments + 1) if model.num_segments % n == 0]


TABLE = (
    Row(("mae", "deepmim"), "linear", _up_to_depth, WHOLE, BOTH),
    Row(("mae", "deepmim"), "linear", _up_to_depth, ("dib_w",), ("coalesced",)),
    Row(("mirl",), "v", _folded, WHOLE, BOTH),
    Row(("mirl",), "linear", _divisors, WHOLE, BOTH),
)


def check_combination(
    model: ModelConfig,
    num_stages: int,
    schedule: str,
    placement: str = "linear",
    reduction: str = "coalesced",
    gradient_flow: str = "full",
) -> None:
    """Raise UserError, one line with key, value and remedy, for a row that is not in TABLE."""
    rows = [row for row in TABLE if model.method in row.methods]
    _narrow(rows, "placement", placement, lambda row: (row.placement,), model)
    rows = [row for row in rows if row.placement == placement]
    stages = rows[0].stages(model)
    if num_stages not in stages:
        allowed = ", ".join(map(str, stages)) if len(stages) < 8 else f"1 to {stages[-1]}"
        raise UserError(
            f"stages={num_stages}: {model.method} with placement={placement} "
            f"and depth={model.depth} can be cut into {allowed} stages; use one of these"
        )
    _narrow(rows, "schedule", schedule, lambda row: row.schedules, model)
    rows = [row for row in rows if schedule in row.schedules]
    if reduction not in rows[0].reductions:
        raise UserError(
            f"reduction={reduction}: schedule={schedule} leaves weight gradients for later and "
            f"needs reduction={rows[0].reductions[0]}; or use schedule=dib"
        )
    if gradient_flow == "local" and model.method != "deepmim":
        raise UserError(
            f"gradient_flow=local: {model.method} has blocks without a loss of their own stage; "
            "use gradient_flow=full"
        )


def _narrow(
    rows: list[Row],
    key: str,
    value: str,
    values: Callable[[Row], tuple[str, ...]],
    model: ModelConfig,
) -> None:
    allowed = [option for row in rows for option in values(row)]
    if value not in allowed:
        names = ", ".join(dict.fromkeys(allowed))
        raise UserError(
            f"{key}={value}: {model.method} is defined for {key} {names}; use one of these"
        )
