"""Which of how many processes this one is, where neither torchrun nor deepspeed says so."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from deepmim_scale.errors import UserError

# Rank, number of ranks, rank on this host, number of ranks on this host.
_OPEN_MPI = tuple(
    f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
)
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # and Intel MPI
_MPI = (_OPEN_MPI, _MPICH)
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def adopt_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give processes that Slurm's srun or mpirun started torch's variables.

    Without them each would take itself for a run of one process, all in one folder.
    """
    if "RANK" in environment:
        return
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        per_host = _tasks_per_host(environment["SLURM_STEP_TASKS_PER_NODE"])
        values: tuple[str, ...] = (
            environment["SLURM_PROCID"],
            environment["SLURM_STEP_NUM_TASKS"],
            environment["SLURM_LOCALID"],
            str(per_host[int(environment["SLURM_NODEID"])]),
        )
        # Any port that all ranks of a step agree on and no other step of a node is likely to have.
        step = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        environment.setdefault("MASTER_PORT", str(20_000 + step % 12_000))
        environment.update(zip(_NAMES, values, strict=True))
        return
    for names in _MPI:
        if int(environment.get(names[1], "1")) > 1 and all(name in environment for name in names):
            values = tuple(environment[name] for name in names)
            if values[1] == values[3]:  # all on one host
                environment.setdefault("MASTER_ADDR", "127.0.0.1")
            environment.setdefault("MASTER_PORT", "29500")
            environment.update(zip(_NAMES, values, strict=True))
            return


def check_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """UserError where several processes were started and it is not known which is which."""
    if "RANK" in environment:
        if "MASTER_ADDR" not in environment:
            raise UserError(
                "MASTER_ADDR: missing; say which host has rank 0, as mpirun -x MASTER_ADDR=HOST"
            )
        return
    for name in ("SLURM_STEP_NUM_TASKS", *(names[1] for names in _MPI)):
        if int(environment.get(name, "1")) > 1:
            raise UserError(
                f"{name}={environment[name]}: several processes, but none knows its rank; "
                "start them by torchrun, deepspeed or srun (docs/cluster.md)"
            )


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts, as `node[03-05,9],gpu1`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", hosts).split(",")[0]


def _tasks_per_host(text: str) -> list[int]:
    """Slurm's `2(x3),1` written out."""
    found: list[int] = []
    for part in text.split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        found += [int(tasks)] * int(times or 1)
    return found
