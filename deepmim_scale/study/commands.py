"""Command line of the scaling study: `deepmim-scale study`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from deepmim_scale.runs.environment import describe_environment
from deepmim_scale.study.cells import Cell, build_cells
from deepmim_scale.study.settings import (
    RESULTS,
    StudyArguments,
    check_folder,
    read_results,
    resolve,
)

__all__ = ["StudyArguments", "run_study"]


def run_study(arguments: StudyArguments) -> None:
    """Run what is not measured yet, write and print the table; exit code 1 if a run failed."""
    from deepmim_scale.study import accuracy, report, runner

    num_gpus = 0 if arguments.gpus_per_node else runner.num_gpus()
    args = check_folder(resolve(arguments, num_gpus))
    cells = build_cells(args)
    saved = Path(args.output) / RESULTS
    environment = read_results(saved)["environment"] if saved.is_file() else {}
    todo = [] if args.dry_run else runner.unfinished(args, cells)
    if todo:
        environment = _go_on(environment, describe_environment())
        legal = [cell for cell in cells if cell.job]
        print(f"{len(todo)} of {len(legal) * args.repeats} runs to do", flush=True)
        report.write_files(args, report.build_rows(args, cells), environment)
    if args.evaluate and not args.dry_run:
        _evaluate(args, cells)
    for _ in runner.run_all(args, todo):
        report.write_files(args, report.build_rows(args, cells), environment)
        if args.evaluate:
            _evaluate(args, cells)
    rows = report.build_rows(args, cells)
    report.write_files(args, rows, environment)
    print("\n".join([report.summary(args), report.table(rows), *report.notes(rows)]))
    if importlib.util.find_spec("matplotlib"):
        from deepmim_scale.study.draw import draw

        draw(rows, Path(args.output) / "study.png")
    else:
        print("no picture: matplotlib is not installed; pip install matplotlib (extra: plots)")
    print(f"wrote {args.output}/study.json, .csv, .md, .png")
    if args.evaluate:
        _report_accuracies(args, cells)
    failed = any(row["status"] == "failed" for row in rows)
    if failed or (not args.dry_run and accuracy.unfinished(args, cells)):
        sys.exit(1)


def _evaluate(args: StudyArguments, cells: list[Cell]) -> None:
    """Evaluate what has finished since, and keep what is known."""
    from deepmim_scale.study import accuracy, runner

    # On a CPU as many as a cell has processes; a GPU is left to one.
    at_once = 1 if runner.num_gpus() else args.processes
    for line in accuracy.run_all(args, accuracy.unfinished(args, cells), at_once):
        print(line, flush=True)
        accuracy.write_files(args, cells)


def _report_accuracies(args: StudyArguments, cells: list[Cell]) -> None:
    from deepmim_scale.study import accuracy

    rows = accuracy.write_files(args, cells)
    if not rows:
        print("no accuracies yet")
        return
    print("\n".join([accuracy.table(rows), *accuracy.verdicts(rows)]))
    if importlib.util.find_spec("matplotlib"):
        from deepmim_scale.study.draw import draw_accuracy

        draw_accuracy(rows, args, Path(args.output) / "accuracy.png")
    print(f"wrote {args.output}/accuracy.json, .md, .png")


def _go_on(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """The environment of this start; a warning where runs of an earlier one had another."""
    for key, value in now.items():
        if key != "date" and before.get(key, value) != value:
            print(f"warning: {key}: earlier runs had {before[key]}, these have {value}")
    return now
