"""From the runs of a study to its table: medians, ratios with intervals, predictions beside them.

A row is a cell over all its repeats; what is not measured is None.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from deepmim_scale.json_file import replace_text
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.study.cells import Cell, CellRun, prediction
from deepmim_scale.study.runner import failure, finished_rows
from deepmim_scale.study.settings import RESULTS, StudyArguments, command

Row = dict[str, Any]
BASELINE = "plain data parallelism with ZeRO-2"
DRAWS = 2000
COLUMNS = (
    "cell",
    "depth",
    "stages",
    "schedule",
    "placement",
    "replicas",
    "microbatches",
    "parameters",
    "status",
    "note",
    "images_per_second",
    "images_per_second_p20",
    "images_per_second_p80",
    "ratio",
    "ratio_low",
    "ratio_high",
    "images_per_second_per_gpu",
    "tflops_per_gpu",
    "mfu",
    "idle",
    "simulated_idle",
    "peak_memory_gib",
    "loss",
    "last_decoder_loss",
    "equal_loss",
    "loss_difference",
    "predicted_images_per_second",
    "predicted_ratio",
    "predicted_mfu",
    "predicted_memory_gib",
    "predicted_fits",
)


def ratio_interval(
    rates: np.ndarray, baseline: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of medians of images/s, and the ends of its 95 % bootstrap interval.

    Both are [repeats, steps]. Repeats are drawn in pairs, because a repeat runs its cells within
    a short time, then steps within each of them.
    """
    rng = np.random.default_rng(seed)
    repeats = len(rates)

    def drawn(values: np.ndarray, picks: np.ndarray) -> float:
        return float(np.median(values[picks, rng.integers(values.shape[1], size=values.shape)]))

    draws = []
    for _ in range(DRAWS):
        picks = rng.integers(repeats, size=(repeats, 1))
        draws.append(drawn(rates, picks) / drawn(baseline, picks))
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(np.median(rates) / np.median(baseline)), float(low), float(high)


def build_rows(args: StudyArguments, cells: list[Cell]) -> list[Row]:
    """The table, a row per cell; the baseline of a depth comes before the cells it is for."""
    rows: list[Row] = []
    baselines: dict[int, tuple[Row, list[list[Row]]]] = {}
    for cell in cells:
        row: Row = dict.fromkeys(COLUMNS)
        row |= {"cell": cell.name, "depth": cell.depth, "stages": cell.stages}
        row["schedule"] = cell.schedule
        rows.append(row)
        if cell.job is None:
            row |= {"status": "not legal", "note": cell.problem}
            continue
        found = [finished_rows(args, cell.run(repeat)) for repeat in range(args.repeats)]
        row |= _expected(args, cell.job) | _measured(args, found) | _status(args, cell, found)
        if cell.stages == 1:
            baselines[cell.depth] = row, found
            row |= {"ratio": 1.0 if any(found) else None, "predicted_ratio": 1.0}
        elif cell.depth in baselines:
            base, runs = baselines[cell.depth]
            row |= _compared(args, found, runs)
            key = "predicted_images_per_second"
            row["predicted_ratio"] = row[key] / base[key]
    return rows


def _expected(args: StudyArguments, job: CellRun) -> Row:
    plan = prediction(args, job)
    return {
        "placement": job.config.placement,
        "replicas": job.replicas,
        "microbatches": job.microbatches,
        "parameters": model_cost(job.config.model).whole.parameters,
        "simulated_idle": plan.idle_fraction,
        "predicted_images_per_second": plan.images_per_second,
        "predicted_mfu": plan.mfu,
        "predicted_memory_gib": plan.memory_bytes / 2**30,
        "predicted_fits": plan.fits,
    }


def _status(args: StudyArguments, cell: Cell, found: list[list[Row]]) -> Row:
    missing = [cell.run(repeat) for repeat, rows in enumerate(found) if not rows]
    if not missing:
        return {"status": "done", "note": ""}
    problems = [problem for run in missing if (problem := failure(args, run))]
    if problems:
        return {"status": "failed", "note": problems[0]}
    return {"status": "not run", "note": ""}


def _timed(args: StudyArguments, done: list[list[Row]], key: str) -> np.ndarray:
    """A number of every step after the warm-up, [repeats, steps, ...]."""
    return np.array([[row[key] for row in rows[args.warmup_steps :]] for rows in done])


def _measured(args: StudyArguments, found: list[list[Row]]) -> Row:
    done = [rows for rows in found if rows]
    if not done:
        return {}

    def median(key: str) -> float:
        return float(np.median(_timed(args, done, key)))

    p20, p80 = np.percentile(_timed(args, done, "images_per_second"), (20, 80))
    tenth = [row for rows in done for row in rows[-max(args.steps // 10, 1) :]]
    last = list(tenth[0]["losses"])[-1]
    return {
        "images_per_second": median("images_per_second"),
        "images_per_second_p20": float(p20),
        "images_per_second_p80": float(p80),
        "images_per_second_per_gpu": median("images_per_second_per_gpu"),
        "tflops_per_gpu": median("tflops_per_gpu"),
        "mfu": median("mfu") if "mfu" in tenth[0] else None,
        "idle": float(np.mean(_timed(args, done, "idle_fraction"))),
        "peak_memory_gib": max(max(rows[-1]["peak_memory_gib"]) for rows in done),
        "loss": _mean([row["loss"] for row in tenth]),
        "last_decoder_loss": _mean([row["losses"][last] for row in tenth]),
    }


def _mean(values: list[float | None]) -> float | None:
    """None where a loss was NaN or infinite."""
    numbers = np.array(values, dtype=float)
    return float(numbers.mean()) if np.isfinite(numbers).all() else None


def _compared(args: StudyArguments, found: list[list[Row]], baseline: list[list[Row]]) -> Row:
    """Ratio to the baseline over the repeats that both have, and whether losses are the same."""
    both = [(ours, theirs) for ours, theirs in zip(found, baseline, strict=True) if ours and theirs]
    if not both:
        return {}
    rates, base = (_timed(args, [pair[k] for pair in both], "images_per_second") for k in (0, 1))
    ratio, low, high = ratio_interval(rates, base)
    ours, theirs = (
        np.array([row["loss"] for pair in both for row in pair[k]], dtype=float) for k in (0, 1)
    )
    with np.errstate(invalid="ignore"):
        differences = np.abs(ours - theirs) / np.abs(theirs)
    known = differences[np.isfinite(differences)]
    return {
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "equal_loss": bool(np.array_equal(ours, theirs, equal_nan=True)),
        "loss_difference": float(known.max()) if known.size else None,
    }


def write_files(args: StudyArguments, rows: list[Row], environment: dict[str, str]) -> None:
    """study.json, study.csv and study.md."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": args.model_dump(mode="json"), "environment": environment, "rows": rows}
    replace_text(folder / RESULTS, json.dumps(content, indent=1) + "\n")
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    replace_text(folder / "study.csv", lines.getvalue())
    replace_text(folder / "study.md", _page(args, rows, environment))


def _page(args: StudyArguments, rows: list[Row], environment: dict[str, str]) -> str:
    measured = any(row["images_per_second"] for row in rows)
    where = ", ".join(f"{key} {value}" for key, value in environment.items())
    text = f"# {args.preset} over depth\n\n    {command(args)}\n\n{summary(args)}\n\n"
    text += f"Measured: {where}.\n\n" if measured else "Nothing is measured.\n\n"
    text += table(rows) + "\n\n![](study.png)\n"
    return text + "".join(f"\n- {note}" for note in notes(rows)) + "\n"


def summary(args: StudyArguments) -> str:
    """What all cells share."""
    return (
        f"{args.processes} processes, {args.global_batch} images per step in micro-batches of "
        f"{args.microbatch_size}; ratios are to one stage, {BASELINE}; predictions are for "
        f"{args.processes} x {args.gpu}, {args.network}."
    )


def notes(rows: list[Row]) -> list[str]:
    """What the table has no room for: why cells have no figures, and losses that differ."""
    found: dict[str, list[str]] = {}
    for row in rows:
        name = row["cell"]
        if row["note"]:
            found.setdefault(f"{row['status']}: {row['note']}", []).append(name)
        if row["equal_loss"] is False:
            name += f" by {_show(row, 'loss_difference', '.1e')}"
            found.setdefault("losses differ from the baseline's, at most", []).append(name)
    return [f"{text} ({', '.join(names)})" for text, names in found.items()]


def _show(row: Row, key: str, form: str) -> str:
    return "" if row[key] is None else format(row[key], form)


def table(rows: list[Row]) -> str:
    """Aligned Markdown, columns without any value left out: the CSV has all there is."""
    measured = any(row["images_per_second"] for row in rows)
    heads: dict[str, list[str]] = {}
    for row in rows:
        ratio, low, high = (_show(row, key, ".2f") for key in ("ratio", "ratio_low", "ratio_high"))
        spread = [_show(row, f"images_per_second_{end}", ".0f") for end in ("p20", "p80")]
        same = {True: "yes", False: "no", None: ""}[row["equal_loss"]]
        shown = {
            "depth": str(row["depth"]),
            "stages": str(row["stages"]),
            "schedule": row["schedule"] + (" on v" if row["placement"] == "v" else ""),
            "M": _show(row, "microbatches", "d"),
            "images/s": _show(row, "images_per_second", ".0f"),
            "p20-p80": "-".join(spread) if spread[0] else "",
            "ratio": ratio,
            "95 %": f"{low}-{high}" if low else "",
            "TFLOP/s/GPU": _show(row, "tflops_per_gpu", ".3g"),
            "MFU": _show(row, "mfu", ".1%"),
            "idle": _show(row, "idle", ".1%"),
            "simulated": _show(row, "simulated_idle", ".1%"),
            "GiB": _show(row, "peak_memory_gib", ".2f"),
            "loss": _show(row, "loss", ".4f"),
            "same loss": same,
            "predicted images/s": _show(row, "predicted_images_per_second", ".0f"),
            "predicted ratio": "" if measured else _show(row, "predicted_ratio", ".2f"),
            "predicted MFU": "" if measured else _show(row, "predicted_mfu", ".1%"),
            "predicted GiB": _show(row, "predicted_memory_gib", ".2f")
            + (" (too much)" if row["predicted_fits"] is False else ""),
            "status": row["status"],
        }
        for head, text in shown.items():
            heads.setdefault(head, []).append(text)
    columns = [[head, *texts] for head, texts in heads.items() if any(texts)]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "| "
        + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in zip(*columns, strict=True)
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
