"""The picture of a study: speed, memory, idle share and loss over depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepmim_scale.study.settings import StudyArguments

Row = dict[str, Any]
MARKERS = "osD^vP*X"


def draw(rows: list[Row], path: Path) -> None:
    """A PNG of four panels, a color per (stages, schedule); predictions if nothing is measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (speed, memory), (idle, last) = figure.subplots(2, 2)
    measured = any(row["images_per_second"] for row in rows)
    prefix = "" if measured else "predicted_"
    ways = list(dict.fromkeys((row["stages"], row["schedule"]) for row in rows))
    for number, way in enumerate(ways):
        ours = [row for row in rows if (row["stages"], row["schedule"]) == way]
        name = "1 stage, data parallel" if way[0] == 1 else f"{way[0]} stages, {way[1]}"
        line: Row = {"color": f"C{number % 10}", "linewidth": 1.2}
        marks: Row = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        _plot(speed, ours, f"{prefix}images_per_second", label=name, **line, **marks)
        _plot(
            memory, ours, "peak_memory_gib" if measured else "predicted_memory_gib", **line, **marks
        )
        _plot(idle, ours, "simulated_idle", scale=100, **line)
        if measured:
            _spread(speed, ours, line["color"])
            _plot(idle, ours, "idle", scale=100, **line | marks | {"linestyle": "none"})
        _plot(last, ours, "loss" if measured else "predicted_ratio", **line, **marks)
    speed.set_ylabel("images/s" + (" (bars: p20 to p80 of the steps)" * measured))
    memory.set_ylabel("peak memory of a process, GiB")
    idle.set_ylabel("idle share, % (lines: simulated" + ("; marks: measured)" if measured else ")"))
    last.set_ylabel("loss, last tenth of the steps" if measured else "images/s over one stage's")
    for axes in (speed, memory, idle, last):
        axes.set_xlabel("depth, blocks")
        axes.set_xticks(sorted({row["depth"] for row in rows}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
        if axes is not last:
            axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1], top=1.05 * axes.get_ylim()[1])
    handles, names = speed.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False
    )
    if not measured:
        figure.suptitle("predicted, not measured")
    figure.savefig(path, dpi=120)


def _plot(axes: Any, rows: list[Row], key: str, scale: float = 1, **style: Any) -> None:
    points = [(row["depth"], scale * row[key]) for row in rows if row[key] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _spread(axes: Any, rows: list[Row], color: str) -> None:
    """Bars from the 20th to the 80th percentile of the steps."""
    done = [row for row in rows if row["images_per_second"] is not None]
    ends = ([row[f"images_per_second_{end}"] for row in done] for end in ("p20", "p80"))
    axes.vlines([row["depth"] for row in done], *ends, color=color, linewidth=3, alpha=0.4)


def draw_accuracy(rows: list[Row], args: StudyArguments, path: Path) -> None:
    """A PNG: accuracy over depth at equal images and FLOPs, and over the blocks of each depth.

    A row of panels for each evaluation; bars are 95 % intervals over seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = list(dict.fromkeys(row["evaluation"] for row in rows))
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure = Figure(figsize=(12, 3.4 * len(evaluations)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(evaluations), 3, squeeze=False)
    for line, evaluation in zip(panels, evaluations, strict=True):
        mine = [row for row in rows if row["evaluation"] == evaluation]
        for axes, budget in zip(line, ("images", "flops"), strict=False):
            for number, preset in enumerate(presets):
                ours = [r for r in mine if r["budget"] == budget and r["preset"] == preset]
                deepest = sorted((r for r in ours if r["last"]), key=lambda row: row["depth"])
                _with_bars(axes, deepest, "depth", preset, number)
            axes.set(title=f"{evaluation}, equal {budget}", xlabel="depth, blocks")
        tapped = [r for r in mine if r["budget"] == "images" and r["block"].startswith("block")]
        models = dict.fromkeys((row["preset"], row["depth"]) for row in tapped)
        for number, (preset, depth) in enumerate(models):
            ours = [r for r in tapped if (r["preset"], r["depth"]) == (preset, depth)]
            blocks = [row | {"number": int(row["block"].removeprefix("block"))} for row in ours]
            _with_bars(line[2], blocks, "number", f"{preset}, {depth} blocks", number)
        line[2].set(title=f"{evaluation} of each tapped block", xlabel="block")
        for axes in line:
            axes.set_ylabel("accuracy, %")
            axes.grid(axis="y", linewidth=0.4)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
    figure.suptitle(f"{args.preset}, {args.data}", fontsize=10)
    figure.savefig(path, dpi=110)


def _with_bars(axes: Any, rows: list[Row], key: str, label: str, number: int) -> None:
    if not rows:
        return
    places, means = [row[key] for row in rows], [row["mean"] for row in rows]
    style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
    axes.plot(places, means, label=label, linewidth=1.2, **style)
    known = [row for row in rows if row["low"] is not None]
    ends = [[row[end] for row in known] for end in ("low", "high")]
    axes.vlines([row[key] for row in known], *ends, color=style["color"], linewidth=2, alpha=0.4)
