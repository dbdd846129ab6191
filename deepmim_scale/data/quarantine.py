"""Which images of a data set must not be decoded: what `data verify` found, and broken headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from deepmim_scale.data.source import OnBad, name_few
from deepmim_scale.errors import UserError


class NameList(Protocol):
    """N names, in the order of the sample ids."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, i: int, /) -> str:
        """Name of a sample."""


def known_bad(
    data: str, names: NameList, sizes: np.ndarray, listed: Path, on_bad: OnBad, verify: str
) -> tuple[dict[int, str], list[str]]:
    """Reasons by sample id, and what to tell about them, one line each.

    `listed` is the quarantine, `sizes` are int32 [N, 2], 0 x 0 where the header cannot be read;
    `verify` is the command to recommend. Raises UserError if no image is good, or, with on_bad
    `fail`, if unreadable ones are not quarantined.
    """
    quarantine = read_quarantine(listed)
    bad = {
        i: quarantine[names[i]]
        for i in range(len(names) if quarantine else 0)
        if names[i] in quarantine
    }
    notes = [f"{len(bad)} quarantined images are not used ({listed})"] if bad else []
    no_header = [int(i) for i in np.flatnonzero(sizes[:, 0] == 0) if i not in bad]
    if no_header:
        few = name_few([names[i] for i in no_header])
        if on_bad == "fail":
            raise UserError(
                f"data={data}: {len(no_header)} unreadable images: {few}; "
                f"run `deepmim-scale {verify}` or use --on-bad replace"
            )
        notes.append(f"{len(no_header)} unreadable images are not used: {few}")
        bad |= dict.fromkeys(no_header, "the header cannot be read")
    if len(bad) == len(names):
        raise UserError(f"data={data}: all {len(bad)} images are bad; see {listed}")
    return bad, notes


def read_quarantine(path: Path) -> dict[str, str]:
    """What `data verify` found bad: name below the folder -> reason; empty if it never ran."""
    if not path.exists():
        return {}
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line)
    # An image's name ends in an extension, so a quote at the end is JSON's.
    return {
        json.loads(name) if name.endswith('"') else name: " ".join(reason)
        for name, *reason in lines
    }
