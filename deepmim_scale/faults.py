"""Faults on request: what `--inject` may say. They are struck by train/inject.py. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

# What each kind is, for messages and the documentation.
KINDS = {
    "kill": "the process is killed (SIGKILL)",
    "hang": "the process waits for ever",
    "slow": "every step from here on takes `seconds` more",
    "nan": "a gradient of the step is NaN",
    "bitflip": "one bit changes, in `of` weights, moments or checkpoint",
    "enospc": "no byte can be saved from here on, as on a full disk",
}
PLACES = ("weights", "moments", "checkpoint")
_RULE = "must be KIND:rank=R,step=N, as kill:rank=2,step=7"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one rank, right before it takes a step."""

    kind: str
    rank: int
    step: int
    of: str = "weights"
    seconds: float = 1.0
    bit: int = 0
    """Number of the flipped bit, over all that there are; beyond the last it starts again."""


def parse_fault(text: str) -> Fault:
    """A fault as `--inject` says it; ValueError with the rule that it breaks."""

    def refuse(rule: str) -> ValueError:
        return ValueError(f"inject={text}: {rule}")

    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise refuse(f"unknown fault; choose one of {', '.join(KINDS)}")
    pairs = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    try:
        fault = Fault(
            kind,
            int(pairs.pop("rank", "0")),
            int(pairs.pop("step")),
            pairs.pop("of", "weights"),
            float(pairs.pop("seconds", "1")),
            int(pairs.pop("bit", "12345")),
        )
    except (KeyError, ValueError):
        raise refuse(_RULE) from None
    if pairs or fault.step < 1 or fault.rank < 0:
        raise refuse(_RULE)
    if fault.of not in PLACES:
        raise refuse(f"of must be one of {', '.join(PLACES)}")
    return fault
