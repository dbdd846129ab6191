"""A Slurm of three virtual nodes: jobs that go on. Started by `make test-slurm`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.checks import SCRIPT, TRAIN, blocks, check_equal, rows
from cluster.hosts import Cluster, wait_for
from cluster.slurm import Slurm, output_of

from deepmim_scale.runs.folder import read_metrics

# Two nodes of one process each: what the job scripts ask of a real cluster, made small.
SMALL = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2")


@pytest.fixture(scope="session")
def slurm(cluster: Cluster) -> Iterator[Slurm]:
    """The daemons, until the session ends."""
    made = Slurm(cluster)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(autouse=True)
def empty_queue(slurm: Slurm) -> Iterator[None]:
    """Every test begins with idle nodes."""
    yield
    slurm.do("scancel", "-f", "--user=root")
    slurm.wait_idle()


def submit(slurm: Slurm, name: str, *words: str, options: tuple[str, ...] = ()) -> str:
    """`sbatch launcher/pretrain.slurm` on two nodes; returns the job's number."""
    line = ["sbatch", "--parsable", *SMALL, *options, "launcher/pretrain.slurm", *TRAIN]
    return slurm.do(*line, "--stages", "2", "--output", f"runs/{name}", *words)


def wait_for_rows(slurm: Slurm, job: str, run: Path, count: int) -> None:
    """Until a job's run has taken so many steps."""
    wait_for(lambda: rows(run) >= count, 240, output_of(slurm.cluster, job))


def last_step(run: Path) -> int:
    """Of the rows so far."""
    return int(read_metrics(run)[-1]["step"])


def check_goes_on(slurm: Slurm, job: str, run: Path, one: Path) -> None:
    """A requeued job resumes at the very step after which it stopped, and ends with equal bits."""
    cluster = slurm.cluster
    slurm.wait_state(job, "PENDING", 120)
    stopped = last_step(run)
    slurm.start_now(job)
    slurm.wait_state(job, "COMPLETED")
    said = output_of(cluster, job)
    assert f"resuming after step {stopped} " in said, said
    check_equal(run, one)


def test_a_job(slurm: Slurm, one: Path) -> None:
    """Two nodes through torchrun: one process's bits, and the map of ranks."""
    job = submit(slurm, "job")
    slurm.wait_state(job, "COMPLETED")
    said = output_of(slurm.cluster, job)
    assert "node1: GPU 0 -> stage 0, replica 0 (rank 0)" in said
    assert "node2: GPU 0 -> stage 1, replica 0 (rank 1)" in said
    assert re.search(r"runs: torchrun .*--rdzv_id " + job, said)
    check_equal(slurm.cluster.clone / "runs" / "job", one)


def test_requeue_at_the_time_limit(slurm: Slurm, one: Path) -> None:
    """Slurm's --signal reaches the script, the script requeues, the ranks save."""
    run = slurm.cluster.clone / "runs" / "time_limit"
    job = submit(slurm, "time_limit")
    wait_for_rows(slurm, job, run, 10)
    # Slurm looks at limits twice a minute: a step must last that the run does.
    slurm.cluster.hosts[1].shape("400kbit")
    try:
        slurm.do("scontrol", "update", f"jobid={job}", "timelimit=9")  # --signal is 10 minutes
        slurm.wait_state(job, "PENDING", 120)
        slurm.do("scontrol", "update", f"jobid={job}", "timelimit=60")
    finally:
        slurm.cluster.hosts[1].shape("")
    check_goes_on(slurm, job, run, one)
    assert "time is nearly up: requeued" in output_of(slurm.cluster, job)


def make_environment(clone: Path) -> None:
    """An environment that `make setup` finds finished: this one's programs."""
    (clone / ".venv").mkdir()
    (clone / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    (clone / ".venv" / ".setup").touch()


def test_the_first_lines_of_the_documentation(slurm: Slurm, one: Path) -> None:
    """From the login node to the first step, and a requeue by hand."""
    cluster = slurm.cluster
    (block,) = blocks("slurm login")
    lines = block.splitlines()
    assert len(lines) <= 6
    clone, *rest = lines
    assert clone.startswith("git clone "), "the clone is there, and its environment"
    make_environment(cluster.clone)
    done = slurm.shell("set -e\n" + "\n".join(rest))
    assert done.code == 0, done.said
    job = done.said.split()[-1]
    (block,) = blocks("slurm requeue")
    wait_for_rows(slurm, job, cluster.clone / "runs" / "first", 3)
    assert cluster.hosts[0].shell(block, JOB=job).code == 0
    slurm.start_now(job)
    slurm.wait_state(job, "COMPLETED")
    assert rows(cluster.clone / "runs" / "first") == 20


def test_preemption(slurm: Slurm, one: Path) -> None:
    """A job of more importance takes the nodes; ours saves and goes on afterwards."""
    run = slurm.cluster.clone / "runs" / "preempted"
    job = submit(slurm, "preempted")
    wait_for_rows(slurm, job, run, 15)
    other = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")
    slurm.do("sbatch", *other, "--wrap", "sleep 1")
    check_goes_on(slurm, job, run, one)


def test_a_node_that_goes_offline(slurm: Slurm, one: Path) -> None:
    """Slurm gives the job other nodes; it goes on from its last checkpoint."""
    cluster, node2 = slurm.cluster, slurm.cluster.hosts[1]
    run = cluster.clone / "runs" / "offline"
    job = submit(slurm, "offline", "--timeout", "10")
    wait_for_rows(slurm, job, run, 15)
    node2.power_off()
    try:
        wait_for(lambda: slurm.restarts(job) >= 1, 240, output_of(cluster, job), every=0.5)
        slurm.start_now(job)
        slurm.wait_state(job, "COMPLETED")
    finally:
        node2.boot()
        node2.link("up")
        slurm.join(node2.name)
    assert "resuming after step" in output_of(cluster, job)
    check_equal(run, one)


def test_fine_tuning(slurm: Slurm, one: Path) -> None:
    """launcher/finetune.slurm: a replica on each GPU of a node."""
    sizes = {"--img-size": 32, "--patch-size": 8, "--embed-dim": 32, "--depth": 2, "--num-heads": 2}
    words = [str(word) for pair in sizes.items() for word in pair]
    words += ["--steps", "2", "--warmup-epochs", "0", "--microbatch-size", "2"]
    words += ["--microbatches", "1", "--data", "samples", "--output", "runs/finetune"]
    script = ["--gpus-per-node=2", "--cpus-per-task=2", "launcher/finetune.slurm"]
    job = slurm.do("sbatch", "--parsable", *script, *words)
    slurm.wait_state(job, "COMPLETED")
    said = output_of(slurm.cluster, job)
    assert re.search(r"node\d: GPU 0-1 -> stage 0, replica 0-1 \(rank 0-1\)", said), said
    assert (slurm.cluster.clone / "runs" / "finetune" / "result.json").is_file(), said


def test_srun_without_a_launcher(slurm: Slurm, one: Path) -> None:
    """Its processes are one run, not two in one folder."""
    (block,) = blocks("slurm srun")
    done = slurm.shell(block)
    assert done.code == 0, done.said
    found = read_metrics(slurm.cluster.clone / "runs" / "srun_docs")
    assert len(found) == 20, "two runs would have mixed their rows"
    words = [*TRAIN, "--steps", "5", "--stages", "2", "--output", "runs/deepspeed_slurm"]
    hosts = slurm.cluster.hostfile(1)
    launcher = ["deepspeed", "--launcher", "slurm", "--hostfile", hosts, SCRIPT, *words]
    done = slurm.cluster.hosts[0].run(*launcher)
    assert done.code == 0, done.said
    assert rows(slurm.cluster.clone / "runs" / "deepspeed_slurm") == 5


def test_a_study_as_an_array(slurm: Slurm, one: Path) -> None:
    """A run per task; one that is stopped goes on; --status and --collect read the folder."""
    folder = slurm.cluster.clone / "runs" / "study"
    (block,) = blocks("slurm study")
    submitted, status_line, collect_line = block.splitlines()
    done = slurm.shell(submitted)
    assert done.code == 0, done.said
    found = re.search(r"2 runs, array job (\d+)", done.said)
    assert found, done.said
    job = found[1]
    run = folder / "runs" / "d4_p2_dib_r0"
    wait_for(lambda: rows(run) >= 5, 240, done.said)
    slurm.do("scancel", "--signal=USR1", f"{job}_1")
    wait_for(
        lambda: "PENDING" in slurm.do("squeue", "-h", "-t", "all", "-o", "%T", "-j", job),
        120,
        "",
        0.5,
    )
    status = slurm.shell(status_line).said
    assert re.search(r"d4_p2_dib_r0 +stopped +\d+/40", status), status
    stopped = rows(run)
    slurm.do("scontrol", "update", f"jobid={job}_1", "starttime=now")
    wait_for(lambda: slurm.do("squeue", "-h", "-j", job) == "", 240, "the array does not end", 0.5)
    collected = slurm.shell(collect_line)
    assert collected.code == 0, collected.said
    table = json.loads((folder / "study.json").read_text())["rows"]
    assert [row["status"] for row in table] == ["done", "done"]
    assert table[1]["equal_loss"] is True
    log = (folder / "runs" / "d4_p2_dib_r0.log").read_text()
    assert f"resuming after step {stopped} " in log
    status = slurm.shell(status_line).said
    assert "2 runs: 2 done" in status
