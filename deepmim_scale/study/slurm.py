"""A study as one array job of Slurm: a run per task, in the study's folder like all others.

A task that is stopped saves its run, and is put into the queue again, where it goes on.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.json_file import replace_text
from deepmim_scale.study.cells import Cell
from deepmim_scale.study.settings import RUNS, StudyArguments, command

SCRIPT = "study.slurm"
# A run saves when it is stopped, and once at its end; none of its timed steps saves.
ONLY_AT_STOPS = ("--save-every", str(10**9))
_TEMPLATE = """#!/usr/bin/env bash
#SBATCH --job-name=study
#SBATCH --array=0-{last}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --output={log}
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
{more}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}
runs=({runs})
code=0
{command} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}" || code=$?
# 75: stopped by the time limit; what was done is saved.
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def submit(args: StudyArguments, todo: list[tuple[Cell, int]]) -> str:
    """Give every run that is to do to Slurm; returns the number of the array job."""
    if not todo:
        return ""
    if shutil.which("sbatch") is None:
        raise UserError("slurm=True: sbatch is not found; start this on a login node")
    runs = [cell.run(repeat) for cell, repeat in todo]
    (Path(args.output) / RUNS).mkdir(parents=True, exist_ok=True)
    script = Path(args.output) / SCRIPT
    text = _TEMPLATE.format(
        last=len(runs) - 1,
        nodes=args.nodes,
        tasks=args.gpus_per_node,
        log=(Path(args.output) / RUNS / "slurm_%a.log").resolve(),
        more="\n".join(f"#SBATCH --{option}" for option in args.sbatch),
        runs=shlex.join(runs),
        command=command(args),
    )
    replace_text(script, text)
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunFailure(f"sbatch {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def launch_words(args: StudyArguments) -> list[str]:
    """What starts the processes of a run inside a job."""
    words = ["srun", "--kill-on-bad-exit=1", f"--ntasks={args.processes}"]
    return [*words, f"--ntasks-per-node={args.gpus_per_node}"]
