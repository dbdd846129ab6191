"""Runs the cells of a study one after another, each in processes of its own, and finds their runs.

What was measured, and why a run failed, is read from the study's folder alone: a study that was
killed goes on where it stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from deepmim_scale.errors import STOPPED
from deepmim_scale.plan.rank_map import read_hostfile
from deepmim_scale.runs.folder import CHECKPOINTS, METRICS, list_checkpoints, read_metrics
from deepmim_scale.study.cells import Cell
from deepmim_scale.study.settings import RUNS, StudyArguments
from deepmim_scale.study.slurm import ONLY_AT_STOPS, launch_words

PRETRAIN = "deepmim_scale.train.pretrain"
EXIT_CODE = "exit code"  # begins the last line of a log


def run_folder(args: StudyArguments, run: str) -> Path:
    """Where a run of a cell lies."""
    return Path(args.output) / RUNS / run


def finished_rows(args: StudyArguments, run: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a run that came to its last step, else none."""
    folder = run_folder(args, run)
    if not (folder / METRICS).is_file():
        return []
    try:
        rows = read_metrics(folder)
    except JSONDecodeError:  # killed while it wrote a line
        return []
    return rows if rows and rows[-1]["step"] == args.steps else []


def unfinished(args: StudyArguments, cells: list[Cell]) -> list[tuple[Cell, int]]:
    """(cell, repeat) of every run that is not measured yet.

    The order is A B C, C B A, ..., so that slow drifts of a machine cancel out.
    """
    legal = [cell for cell in cells if cell.job]
    order = []
    for repeat in range(args.repeats):
        order += [(cell, repeat) for cell in (legal if repeat % 2 == 0 else reversed(legal))]
    return [(cell, repeat) for cell, repeat in order if not finished_rows(args, cell.run(repeat))]


def launch_command(args: StudyArguments, cell: Cell, run: str) -> list[str]:
    """The command line of a run: the deepspeed launcher, or plain Python for one process."""
    assert cell.job is not None, "only legal cells are launched"
    words = [*cell.job.words, "--output", str(run_folder(args, run))]
    if args.evaluate:
        words += ["--seed", run.rpartition("_r")[2]]
    if args.only:  # in a job of Slurm
        words = [*words, *([] if args.evaluate else ONLY_AT_STOPS)]
        return [*launch_words(args), sys.executable, "-m", PRETRAIN, *words]
    if args.processes == 1:
        return [sys.executable, "-m", PRETRAIN, *words]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(args.gpus_per_node),
    ]
    if args.hostfile:
        launcher += ["--hostfile", args.hostfile, "--num_nodes", str(args.nodes)]
    return [*launcher, "--master_port", str(_free_port()), "--module", PRETRAIN, *words]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def launch(args: StudyArguments, cell: Cell, repeat: int) -> int:
    """Run a cell; what it prints goes to RUNS/<run>.log, and its exit code, returned, at the end.

    One that was cut off begins again, unless it kept a checkpoint, as in a job of Slurm.
    """
    run = cell.run(repeat)
    folder = run_folder(args, run)
    if not (args.only and list_checkpoints(folder)):
        shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log_of(args, run).open("a" if args.only else "w") as log:
        done = subprocess.run(
            launch_command(args, cell, run),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != STOPPED:  # else it goes on, and has not failed
            log.write(f"\n{EXIT_CODE} {done.returncode}\n")
    return done.returncode


def run_one(args: StudyArguments, todo: list[tuple[Cell, int]]) -> int:
    """Do the run that `args` name, if it is not done yet; returns its exit code."""
    found = [(cell, repeat) for cell, repeat in todo if cell.run(repeat) == args.only]
    if not found:
        print(f"{args.only}: nothing to do")
        return 0
    code = launch(args, *found[0])
    print(f"{args.only}: {'stopped' if code == STOPPED else _outcome(args, args.only)}")
    if not code and not args.evaluate:  # it was for going on
        shutil.rmtree(run_folder(args, args.only) / CHECKPOINTS, ignore_errors=True)
    return code


def log_of(args: StudyArguments, run: str) -> Path:
    """File with all that a run printed."""
    return Path(args.output) / RUNS / f"{run}.log"


def failure(args: StudyArguments, run: str) -> str:
    """Why a launched run did not come to its end, in one line; empty if none was launched."""
    path = log_of(args, run)
    text = path.read_text(errors="replace") if path.is_file() else ""
    # pdsh begins every line with its host, torch some with their rank.
    hosts = read_hostfile(args.hostfile) if args.hostfile else {}
    prefix = rf"^(({'|'.join(map(re.escape, hosts))}): )?(\[rank\d+\]: *)?"
    lines = [re.sub(prefix, "", line.strip()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines or not lines[-1].startswith(EXIT_CODE):  # the study itself was killed
        return ""
    memory = [line for line in lines if re.search("out of memory|OutOfMemory", line, re.IGNORECASE)]
    if memory:
        return f"out of memory: {_short(memory[0])}"
    if re.search(rf"(return code =|{EXIT_CODE}) -9\b", text):
        return "killed by signal 9, as the system does when memory runs out"
    # The first error is the cause; other ranks then complain of the one that left.
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return _short(errors[0] if errors else lines[-1])


def _short(line: str, length: int = 200) -> str:
    line = line.removeprefix("error: ")
    return line if len(line) <= length else line[: length - 3] + "..."


def run_all(args: StudyArguments, todo: list[tuple[Cell, int]]) -> Iterator[None]:
    """Run (cell, repeat) after (cell, repeat), with a line and a pause after each."""
    began, work = time.monotonic(), 0
    total = sum(cell.depth for cell, _ in todo)
    for number, (cell, repeat) in enumerate(todo, start=1):
        run, start = cell.run(repeat), time.monotonic()
        launch(args, cell, repeat)
        now = time.monotonic()
        work += cell.depth
        left = (now - began) / work * (total - work)  # a run's time grows with its depth
        rest = f", about {_duration(left)} left" if left else ""
        print(
            f"[{number}/{len(todo)}] {run}: {_outcome(args, run)}; {now - start:.0f} s{rest}",
            flush=True,
        )
        yield


def _outcome(args: StudyArguments, run: str) -> str:
    rows = finished_rows(args, run)
    if not rows:
        return f"failed: {failure(args, run)}"
    rates = sorted(row["images_per_second"] for row in rows[args.warmup_steps :])
    memory = max(rows[-1]["peak_memory_gib"])
    return f"{rates[len(rates) // 2]:.0f} images/s, {memory:.2f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def num_gpus() -> int:
    """Of this machine."""
    import torch

    return torch.cuda.device_count()
