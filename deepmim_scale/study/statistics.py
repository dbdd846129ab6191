"""Means and their 95 % intervals over a few seeds. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its 95 % interval by Student's t; of one value the mean alone."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _T95[count - 2] if count - 2 < len(_T95) else _NORMAL
    half = quantile * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


def verdict(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """Difference of accuracies in points, paired over the seeds that both have, and what it shows.

    It shows something only if its interval leaves out 0.
    """
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return "no seed in common"
    mean, low, high = interval([ours[seed] - theirs[seed] for seed in shared])
    if low is None or high is None:
        return f"{mean:+.1f} points, one seed shows nothing"
    shows = "no difference shown"
    if low > 0 or high < 0:
        shows = "better" if mean > 0 else "worse"
    return f"{mean:+.1f} points (95 %: {low:+.1f} to {high:+.1f}, {len(shared)} seeds): {shows}"
