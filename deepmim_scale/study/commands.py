"""Command line of the scaling study: `deepmim-scale study`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from deepmim_scale.runs.environment import describe_environment
from deepmim_scale.runs.folder import STARTS
from deepmim_scale.study import slurm
from deepmim_scale.study.cells import Cell, build_cells
from deepmim_scale.study.settings import (
    RESULTS,
    StudyArguments,
    check_folder,
    read_results,
    resolve,
    saved_arguments,
)

__all__ = ["StudyArguments", "run_study"]


def run_study(arguments: StudyArguments) -> None:
    """Run what is not measured yet, write and print the table; exit code 1 if a run failed."""
    from deepmim_scale.study import accuracy, report, runner

    if arguments.status or arguments.collect:
        _look(arguments)
        return
    num_gpus = 0 if arguments.gpus_per_node else runner.num_gpus()
    args = check_folder(resolve(arguments, num_gpus))
    cells = build_cells(args)
    saved = Path(args.output) / RESULTS
    environment = read_results(saved)["environment"] if saved.is_file() else {}
    todo = [] if args.dry_run else runner.unfinished(args, cells)
    if args.only:
        code = runner.run_one(args, todo)
        if not code and args.evaluate:
            _evaluate(args, cells)
        sys.exit(code)
    if args.slurm:
        report.write_files(args, report.build_rows(args, cells), environment)
        job = slurm.submit(args, todo)
        print(f"{len(todo)} runs, array job {job}" if job else "all runs are done")
        print(f"deepmim-scale study --status {args.output}; --collect {args.output} for the tables")
        return
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


def _look(arguments: StudyArguments) -> None:
    """Say how far a study is, or write its tables from what there is."""
    from deepmim_scale.study import report, status

    args = saved_arguments(arguments.status or arguments.collect)
    cells = build_cells(args)
    found = status.describe(args, status.status_of(args, cells))
    if arguments.status:
        print("\n".join(found))
        return
    saved = read_results(Path(args.output) / RESULTS)["environment"]
    rows = report.build_rows(args, cells)
    report.write_files(args, rows, saved or _environment_of_runs(args, cells))
    print("\n".join([report.summary(args), report.table(rows), *report.notes(rows), found[-1]]))
    print(f"wrote {args.output}/study.json, .csv, .md")
    if args.evaluate:
        _report_accuracies(args, cells)


def _environment_of_runs(args: StudyArguments, cells: list[Cell]) -> dict[str, str]:
    """Where the last run that was started ran: a login node says nothing of the others."""
    from deepmim_scale.study.runner import run_folder

    runs = [cell.run(repeat) for cell in cells if cell.job for repeat in range(args.repeats)]
    files = [run_folder(args, run) / STARTS for run in runs]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    last = json.loads(lines[-1]) if lines else {}
    return {key: value for key, value in last.items() if key not in ("step", "num_processes")}


def _evaluate(args: StudyArguments, cells: list[Cell]) -> None:
    """Evaluate what has finished since, and keep what is known."""
    from deepmim_scale.study import accuracy, runner

    # On a CPU as many as a cell has processes; a GPU is left to one.
    at_once = 1 if runner.num_gpus() else args.processes
    todo = accuracy.unfinished(args, cells)
    mine = [task for task in todo if args.only in ("", task.cell.run(task.repeat))]
    for line in accuracy.run_all(args, mine, at_once):
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
