"""Pictures of a timeline: a Gantt chart (PNG, SVG) and a Chrome trace (chrome://tracing)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepmim_scale.pipeline.ir import Instruction, Kind
from deepmim_scale.pipeline.simulate import Event, Timeline, timeline_of

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
MEASURED, SIMULATED = "measured", "simulated"
"""How timelines are called in traces."""
MIN_LABELLED_SHARE = 0.006
"""Boxes narrower than this share of the width have no number."""


def draw_gantt(timeline: Timeline, path: str | Path, title: str) -> None:
    """Write a picture in the format of the file's ending: a row per rank, numbers = micro-batches.

    On the V a rank's deeper stage is hatched.
    """
    draw_gantts({title: timeline}, path)


def draw_gantts(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Several timelines below one another on one axis of time, each under its title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [0.55 * len(timeline.busy) + 0.5 for timeline in timelines.values()]
    figure = Figure(figsize=(14, 0.8 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(
        len(timelines), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    # The legend names what is in the picture, not all that could be.
    drawn: set[Kind] = set()
    hatched = False
    width = max(timeline.makespan for timeline in timelines.values())
    for (axes,), (title, timeline) in zip(rows, timelines.items(), strict=True):
        drawn |= _draw_rows(axes, timeline, width)
        axes.set_title(title, fontsize=10, loc="left")
        hatched |= any(e.instruction.stage >= len(timeline.busy) for e in timeline.events)
    rows[-1, 0].set_xlabel("ms")
    handles = [
        Patch(color=color, label=label) for kind, (color, label) in COLORS.items() if kind in drawn
    ]
    if hatched:
        handles.append(Patch(facecolor="white", edgecolor="gray", hatch="///", label="deep stage"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def _draw_rows(axes: Any, timeline: Timeline, width: float) -> set[Kind]:
    """One timeline on an axis of `width` seconds; the kinds that it shows."""
    num_ranks, unit = len(timeline.busy), 1e3  # milliseconds
    drawn: set[Kind] = set()
    for event in timeline.events:
        step, seconds = event.instruction, event.end - event.start
        if step.kind not in COLORS or not seconds:
            continue
        drawn.add(step.kind)
        axes.barh(
            event.rank,
            seconds * unit,
            left=event.start * unit,
            height=0.86,
            color=COLORS[step.kind][0],
            edgecolor="white",
            linewidth=0.6,
            hatch="///" if step.stage >= num_ranks else None,
        )
        if seconds > MIN_LABELLED_SHARE * width:
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
    axes.set_xlim(0, width * unit)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return drawn


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """Trace events in microseconds: a process per timeline, a thread per rank, waits included."""
    events: list[dict[str, Any]] = []
    for pid, (name, timeline) in enumerate(timelines.items()):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        events += [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": pid,
                "tid": rank,
                "args": {"name": f"rank {rank}"},
            }
            for rank in range(len(timeline.busy))
        ]
        events += [_trace_event(e, pid) for e in timeline.events if e.end > e.start]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _trace_event(event: Event, pid: int) -> dict[str, Any]:
    step = event.instruction
    waits = step.kind == "wait"
    return {
        "name": f"wait for {step.payload}" if waits else f"{step.kind} {step.microbatch}",
        "cat": step.kind,
        "ph": "X",
        "ts": event.start * 1e6,
        "dur": (event.end - event.start) * 1e6,
        "pid": pid,
        "tid": event.rank,
        "args": {key: value for key, value in vars(step).items() if value is not None},
    }


def timelines_of(trace: Mapping[str, Any]) -> dict[str, Timeline]:
    """The timelines of a `chrome_trace`, without what took no time."""
    names: dict[int, str] = {}
    ranks: Counter[int] = Counter()
    events: dict[int, list[Event]] = {}
    for entry in trace["traceEvents"]:
        pid = entry["pid"]
        if entry["name"] == "process_name":
            names[pid] = entry["args"]["name"]
        elif entry["name"] == "thread_name":
            ranks[pid] += 1
        else:
            start = entry["ts"] / 1e6
            step = Instruction(**entry["args"])
            event = Event(entry["tid"], step, start, start + entry["dur"] / 1e6)
            events.setdefault(pid, []).append(event)
    return {name: timeline_of(events.get(pid, []), ranks[pid]) for pid, name in names.items()}


def write_trace(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Write `chrome_trace` as JSON."""
    Path(path).write_text(json.dumps(chrome_trace(timelines)))
