"""Every decoder's loss over a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def falls(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean of each loss over the first and over the last tenth of the rows."""
    tenth = max(len(rows) // 10, 1)

    def mean(name: str, part: list[dict[str, Any]]) -> float:
        return float(np.mean([row["losses"][name] for row in part]))

    return {
        name: (mean(name, rows[:tenth]), mean(name, rows[-tenth:])) for name in rows[0]["losses"]
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A PNG: smoothed training losses as lines, held-out losses as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([row["step"] for row in rows])
    held_out = [row for row in rows if "validation_losses" in row]
    window = max(len(rows) // 80, 1)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, name in enumerate(rows[0]["losses"]):
        values = np.array([row["losses"][name] for row in rows])
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, label=name, linewidth=1.2, color=f"C{number}")
        dots = [row["validation_losses"][name] for row in held_out]
        axes.plot([row["step"] for row in held_out], dots, "o", color=f"C{number}", markersize=3)
    axes.set(xlabel="step", ylabel="loss (dots: held out)", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
