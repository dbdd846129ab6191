"""Every decoder's loss over a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FEW = 20  # rows whose points are marked


def curve(rows: list[dict[str, Any]], name: str, key: str = "losses") -> np.ndarray:
    """One loss of every row, float64 [rows]; NaN where it was not finite (null in the file)."""
    return np.array([row[key][name] for row in rows], float)


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def loss_drop(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean of each loss over the first and over the last tenth of the rows, NaN left out."""
    tenth = max(len(rows) // 10, 1)
    return {
        name: (_mean(curve(rows[:tenth], name)), _mean(curve(rows[-tenth:], name)))
        for name in rows[0]["losses"]
    }


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Means [n - window + 1] over a sliding window of values [n]; NaN where all of it is NaN."""
    finite = np.isfinite(values)
    sums, counts = (
        np.convolve(part, np.ones(window), mode="valid")
        for part in (np.where(finite, values, 0.0), finite)
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A PNG: smoothed training losses as lines, validation losses as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([row["step"] for row in rows])
    validation = [row for row in rows if "validation_losses" in row]
    window = max(len(rows) // 80, 1)
    marker = "." if len(rows) < FEW else ""  # a line needs two neighbors to be seen
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, name in enumerate(rows[0]["losses"]):
        smooth = smoothed(curve(rows, name), window)
        style = {"label": name, "linewidth": 1.2, "color": f"C{number}", "marker": marker}
        axes.plot(steps[window - 1 :], smooth, **style)
        dots = curve(validation, name, "validation_losses")
        axes.plot([row["step"] for row in validation], dots, "o", color=f"C{number}", markersize=3)
    axes.set(xlabel="step", ylabel="loss (dots: validation)")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax if np.isfinite(axes.dataLim.ymax) else None)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
