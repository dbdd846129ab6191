"""Pictures of a timeline: a Gantt chart (PNG, SVG) and a Chrome trace (chrome://tracing)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepmim_scale.pipeline.ir import Kind
from deepmim_scale.pipeline.simulate import Timeline

# Hue: encoder blue, decoder orange; light forward, dark backward, gray-toned weight gradients.
COLORS: dict[Kind, tuple[str, str]] = {
    "forward": ("#9ecae1", "encoder forward"),
    "encoder_backward": ("#2171b5", "encoder backward"),
    "encoder_weight_gradient": ("#6b7f93", "encoder weight gradient"),
    "decoder_forward": ("#fdd0a2", "decoder forward"),
    "decoder": ("#fd9a3c", "decoder forward and backward"),
    "decoder_backward": ("#d94801", "decoder backward"),
    "decoder_weight_gradient": ("#a08b78", "decoder weight gradient"),
}
DARK = {"encoder_backward", "encoder_weight_gradient", "decoder_backward"}
MIN_LABELLED_SHARE = 0.006
"""Boxes narrower than this share of the width have no number."""


def draw_gantt(timeline: Timeline, path: str | Path, title: str) -> None:
    """Write a picture in the format of the file's ending: a row per rank, numbers = micro-batches.

    On the V a rank's deeper stage is hatched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_ranks = len(timeline.busy)
    figure = Figure(figsize=(14, 1.3 + 0.55 * num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit = 1e3  # milliseconds
    width = timeline.makespan * unit
    # The legend names what is in the picture, not all that could be.
    drawn: set[Kind] = set()
    hatched = False
    for event in timeline.events:
        step, seconds = event.instruction, event.end - event.start
        if step.kind not in COLORS or not seconds:
            continue
        deeper = step.stage >= num_ranks
        drawn.add(step.kind)
        hatched |= deeper
        axes.barh(
            event.rank,
            seconds * unit,
            left=event.start * unit,
            height=0.86,
            color=COLORS[step.kind][0],
            edgecolor="white",
            linewidth=0.6,
            hatch="///" if deeper else None,
        )
        if seconds > MIN_LABELLED_SHARE * timeline.makespan:
            axes.text(
                (event.start + seconds / 2) * unit,
                event.rank,
                str(step.microbatch),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if step.kind in DARK else "black",
            )
    axes.set_yticks(
        range(num_ranks),
        [f"rank {rank}\nidle {idle:.1%}" for rank, idle in enumerate(timeline.idle)],
        fontsize=8,
    )
    axes.set_ylim(num_ranks - 0.5, -0.5)  # rank 0 on top, as papers draw it
    axes.set_xlim(0, width)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Patch(color=color, label=label) for kind, (color, label) in COLORS.items() if kind in drawn
    ]
    if hatched:
        handles.append(Patch(facecolor="white", edgecolor="gray", hatch="///", label="deep stage"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Trace events in microseconds: a thread per rank, waits for messages included."""
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(timeline.busy))
    ]
    for event in timeline.events:
        step = event.instruction
        if event.end == event.start:
            continue
        waits = step.kind == "wait"
        events.append(
            {
                "name": f"wait for {step.payload}" if waits else f"{step.kind} {step.microbatch}",
                "cat": "wait" if waits else step.kind,
                "ph": "X",
                "ts": event.start * 1e6,
                "dur": (event.end - event.start) * 1e6,
                "pid": 0,
                "tid": event.rank,
                "args": {key: value for key, value in vars(step).items() if value is not None},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(timeline: Timeline, path: str | Path) -> None:
    """Write `chrome_trace` as JSON."""
    Path(path).write_text(json.dumps(chrome_trace(timeline)))
