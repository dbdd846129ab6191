"""What the encoders of a study are worth: probes and fine-tuning of every cell of one stage.

Each repeat is another seed. An evaluation looks at the last checkpoint (equal images), and at the
one that had cost what the shallowest cell costs in all (equal FLOPs). What is found lies in the
study's folder, a file for each evaluation of each run, so that a study that was killed goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepmim_scale.json_file import replace_text
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.runs.folder import step_folder
from deepmim_scale.study.cells import Cell, equal_flops_step
from deepmim_scale.study.runner import finished_rows, log_of, run_folder
from deepmim_scale.study.settings import StudyArguments
from deepmim_scale.study.statistics import interval, verdict

Row = dict[str, Any]
FINETUNE = "finetune"
BUDGETS = ("images", "flops")
RESULT = "accuracy.json"


@dataclass(frozen=True)
class Task:
    """One evaluation of one checkpoint of one run."""

    cell: Cell
    repeat: int
    evaluation: str
    """As it was asked for: a name, perhaps with flags."""
    budget: str
    step: int

    @property
    def name(self) -> str:
        """The kind of evaluation."""
        return self.evaluation.split()[0]

    @property
    def label(self) -> str:
        """Beginning of the names of its files."""
        return f"{self.cell.run(self.repeat)}_{self.name}_{self.budget}"


def tasks(args: StudyArguments, cells: list[Cell]) -> list[Task]:
    """All evaluations of the study, those of equal images first."""
    found = []
    baselines = [cell for cell in cells if cell.stages == 1 and cell.job]
    for repeat in range(args.repeats):
        for cell in baselines:
            for evaluation in args.evaluate:
                found.append(Task(cell, repeat, evaluation, BUDGETS[0], args.steps))
                step = equal_flops_step(args, cell.depth)
                if step < args.steps:
                    found.append(Task(cell, repeat, evaluation, BUDGETS[1], step))
    return found


def result_file(args: StudyArguments, task: Task) -> Path:
    """Where the accuracies of a task lie once it is done."""
    return run_folder(args, f"{task.label}.json")


def unfinished(args: StudyArguments, cells: list[Cell]) -> list[Task]:
    """The tasks that can be done now: their run is finished, they are not."""
    return [
        task
        for task in tasks(args, cells)
        if finished_rows(args, task.cell.run(task.repeat)) and not result_file(args, task).is_file()
    ]


def words_of(args: StudyArguments, task: Task, output: Path) -> list[str]:
    """The command line of a task, which writes `output`."""
    run = run_folder(args, task.cell.run(task.repeat))
    name, *flags = shlex.split(task.evaluation)
    start = [sys.executable, "-m", "deepmim_scale.cli"]
    checkpoint = str(step_folder(run, task.step))
    if name == FINETUNE:
        data = [] if any(flag.startswith("--data") for flag in flags) else ["--data", args.data]
        words = [name, checkpoint, *data, "--output", str(output), "--seed", str(task.repeat)]
        return [*start, *words, "--save-every", "0", *flags]
    pool = ["--pool", "mean"] if name in ("knn", "linear") and "--pool" not in flags else []
    return [*start, "evaluate", name, checkpoint, *pool, "--json", str(output), *flags]


def run_all(args: StudyArguments, todo: list[Task], at_once: int) -> Iterator[str]:
    """Do the tasks, some at once, each in a process of its own; gives a line on each."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda task: run(args, task), todo)


def run(args: StudyArguments, task: Task) -> str:
    """Do one task; what it prints goes to its log. Returns the best block's accuracy in a line."""
    final = result_file(args, task)
    part = final.with_suffix("" if task.name == FINETUNE else ".part")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log_of(args, task.label).open("w") as log:
        done = subprocess.run(
            words_of(args, task, part),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    if done.returncode:
        return f"{task.label}: failed, see {log_of(args, task.label)}"
    accuracies = _accuracies(task, part)
    # A file under its final name is complete.
    replace_text(final, json.dumps(accuracies))
    return f"{task.label}: {max(accuracies.values()):.1f} %"


def _accuracies(task: Task, output: Path) -> dict[str, float]:
    """Accuracy in percent by block, the last one last; of fine-tuning one number."""
    if task.name == FINETUNE:
        result = json.loads((output / "result.json").read_text())
        return {"whole": result["last"]["accuracy"]}
    rows = json.loads(output.read_text())["rows"]
    output.unlink()
    found: dict[str, float] = {}
    for row in rows:
        if row.get("encoder", "trained") != "trained":
            continue
        block = row.get("features") or f"block{row['block']:02d}"
        found[block] = max(row["accuracy"], found.get(block, 0.0))
    return dict(sorted(found.items()))


def build_rows(args: StudyArguments, cells: list[Cell]) -> list[Row]:
    """A row for each depth, evaluation, budget and block: mean and 95 % interval over seeds."""
    rows: dict[tuple[int, str, str, str], Row] = {}
    for task in tasks(args, cells):
        path = result_file(args, task)
        if not path.is_file():
            continue
        assert task.cell.job is not None, "only cells with a job have tasks"
        config = task.cell.job.config.model
        found = json.loads(path.read_text())
        for block, accuracy in found.items():
            key = (task.cell.depth, task.name, task.budget, block)
            row = rows.setdefault(
                key,
                {
                    "preset": args.preset,
                    "depth": task.cell.depth,
                    "evaluation": task.name,
                    "budget": task.budget,
                    "block": block,
                    "last": block == list(found)[-1],
                    "step": task.step,
                    "training_flops": model_cost(config).whole.training_flops
                    * task.step
                    * (args.global_batch or 0),
                    "draws": {},
                },
            )
            row["draws"][str(task.repeat)] = accuracy
    # The shallowest cell's whole training is the budget that the others are held to.
    shallowest = min((row["depth"] for row in rows.values()), default=0)
    for row in [r for r in rows.values() if r["depth"] == shallowest and r["budget"] == BUDGETS[0]]:
        key = (row["depth"], row["evaluation"], BUDGETS[1], row["block"])
        rows[key] = row | {"budget": BUDGETS[1]}
    for row in rows.values():
        row["mean"], row["low"], row["high"] = interval(list(row["draws"].values()))
    return list(rows.values())


def load_beside(args: StudyArguments) -> list[Row]:
    """Rows of other studies that are drawn and compared too."""
    rows: list[Row] = []
    for folder in args.beside:
        rows += json.loads((Path(folder) / RESULT).read_text())["rows"]
    return rows


def _select(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def verdicts(rows: list[Row]) -> list[str]:
    """A line for each question that the rows can answer, from differences paired over seeds."""
    lines = []
    for evaluation in dict.fromkeys(row["evaluation"] for row in rows):
        for budget in BUDGETS:
            for preset in dict.fromkeys(row["preset"] for row in rows):
                ours = _select(rows, evaluation=evaluation, budget=budget, preset=preset, last=True)
                ours.sort(key=lambda row: row["depth"])
                if len(ours) > 1:
                    first, last = ours[0], ours[-1]
                    question = (
                        f"{preset}, {evaluation}, equal {budget}: does depth help? "
                        f"{last['depth']} blocks over {first['depth']}"
                    )
                    lines.append(f"{question}: {verdict(last['draws'], first['draws'])}")
            lines += _between_presets(rows, evaluation, budget)
    return lines


def _between_presets(rows: list[Row], evaluation: str, budget: str) -> list[str]:
    """Every other preset against the first, at each depth that both have."""
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    lines = []
    for other in presets[1:]:
        for row in _select(rows, evaluation=evaluation, budget=budget, preset=other, last=True):
            wanted = {"evaluation": evaluation, "budget": budget, "preset": presets[0]}
            base = _select(rows, **wanted, depth=row["depth"], last=True)
            if base:
                found = verdict(row["draws"], base[0]["draws"])
                lines.append(
                    f"{evaluation}, equal {budget}, {row['depth']} blocks: {other} over "
                    f"{presets[0]}: {found}"
                )
    return lines


def table(rows: list[Row]) -> str:
    """Markdown: a line per preset, depth and block, a column per evaluation and budget."""
    heads = list(dict.fromkeys((row["evaluation"], row["budget"]) for row in rows))
    titles = [f"{evaluation}, equal {budget}" for evaluation, budget in heads]
    lines = [
        f"| preset | depth | block | {' | '.join(titles)} |",
        "|---|---:|---|" + "---:|" * len(heads),
    ]
    for preset, depth, block in dict.fromkeys((r["preset"], r["depth"], r["block"]) for r in rows):
        cells = []
        for evaluation, budget in heads:
            wanted = {"evaluation": evaluation, "budget": budget, "block": block}
            found = _select(rows, preset=preset, depth=depth, **wanted)
            cells.append(_shown(found[0]) if found else "")
        lines.append(f"| {preset} | {depth} | {block} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(row: Row) -> str:
    if row["low"] is None:
        return f"{row['mean']:.1f}"
    return f"{row['mean']:.1f} ({row['low']:.1f} to {row['high']:.1f})"


def write_files(args: StudyArguments, cells: list[Cell]) -> list[Row]:
    """accuracy.json and accuracy.md; returns the rows, with those of the studies beside."""
    rows = build_rows(args, cells)
    folder = Path(args.output)
    replace_text(folder / RESULT, json.dumps({"rows": rows}, indent=1) + "\n")
    everything = rows + load_beside(args)
    lines = "".join(f"- {line}\n" for line in verdicts(everything))
    head = (
        f"# Accuracy over depth\n\n{args.preset}, {args.data}; percent, mean of {args.repeats} "
        "seeds (95 % interval)\n\n"
    )
    (folder / "accuracy.md").write_text(
        f"{head}{table(everything)}\n\n{lines}\n![](accuracy.png)\n"
    )
    return everything
