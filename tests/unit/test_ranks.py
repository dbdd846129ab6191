"""Slurm's and MPI's variables become torch's, or a start is refused."""

from __future__ import annotations

import pytest

from deepmim_scale.errors import UserError
from deepmim_scale.ranks import adopt_ranks, check_ranks, first_host

SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[03-04,9]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(given: dict[str, str]) -> tuple[str | None, ...]:
    environment = dict(given)
    adopt_ranks(environment)
    check_ranks(environment)
    return tuple(environment.get(name) for name in TORCH)


def test_srun() -> None:
    assert adopted(SRUN) == ("3", "5", "1", "2", "node03")
    assert adopted(SRUN | {"SLURM_NODEID": "2"})[3] == "1"
    ports = []
    for step in ("2", "3"):
        environment = SRUN | {"SLURM_STEP_ID": step}
        adopt_ranks(environment)
        ports.append(int(environment["MASTER_PORT"]))
    assert ports[0] != ports[1], "two steps may share a node"
    assert adopted(SRUN | {"MASTER_ADDR": "ib0"})[4] == "ib0", "the user's word stands"


def test_mpirun() -> None:
    one_host = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert adopted(one_host) == ("1", "4", "1", "4", "127.0.0.1")
    with pytest.raises(UserError, match="MASTER_ADDR: missing; say which host has rank 0"):
        adopted(OPEN_MPI)
    assert adopted(OPEN_MPI | {"MASTER_ADDR": "node1"}) == ("1", "4", "1", "2", "node1")
    mpich = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert adopted(mpich) == ("0", "2", "0", "2", "127.0.0.1")


def test_who_is_left_alone() -> None:
    assert adopted({}) == (None,) * 5
    assert adopted(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == (None,) * 5, "a process of its own"
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1"}
    assert adopted(SRUN | launched)[:3] == ("0", "2", "0"), "torchrun under srun has spoken"


def test_ranks_that_nobody_knows() -> None:
    with pytest.raises(UserError, match="PMI_SIZE=2: several processes, but none knows its rank"):
        adopted({"PMI_RANK": "0", "PMI_SIZE": "2"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-12]", "gpu07"), ("r[2,5]n[1-3],x", "r2n1")],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
