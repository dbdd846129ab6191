"""Two hosts for real: launchers, bits, bytes on the cards, faults. Started by `make test-cluster`.

All runs have the same images and steps, so that one run in one process judges all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.checks import SCRIPT, STEPS, TIMEOUT, TRAIN, blocks, check_equal, rows
from cluster.hosts import Cluster, Command, Host, wait_for

from deepmim_scale.plan.cost import gradient_traffic_bytes, model_cost, weight_traffic_bytes
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.folder import read_metrics

KEEPALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=3 -o ServerAliveCountMax=2"}
RENDEZVOUS = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29500")
# What a survivor says: who it is, and in which instruction it waited for whom.
SURVIVOR = r"error: rank {rank} on {host}, stage \d, micro-batch \d, instruction \w+"


def pdsh(cluster: Cluster, name: str, *words: str, slots: int = 1) -> list[str]:
    """`deepspeed --hostfile` over two hosts, from the first of them."""
    hosts = cluster.hostfile(slots)
    start = ["deepspeed", "--hostfile", hosts, SCRIPT, *TRAIN, "--timeout", str(TIMEOUT)]
    return [*start, *words, "--output", f"runs/{name}"]


def payload_per_step(
    command: Command, run: Path, host: Host, first: int = 5, last: int = STEPS - 5
) -> tuple[float, float]:
    """Bytes that a host sends and receives in a step; read when a step's row is new."""
    wait_for(lambda: rows(run) >= first or command.code is not None, 120, command.said)
    begin, sent = rows(run), host.payload()
    wait_for(lambda: rows(run) >= last or command.code is not None, 300, command.said)
    end, sent_later = rows(run), host.payload()
    assert end > begin, command.said
    out, into = ((b - a) / (end - begin) for a, b in zip(sent, sent_later, strict=True))
    return out, into


def test_a_pipeline_over_two_hosts(cluster: Cluster, one: Path) -> None:
    """Through pdsh, cut as `plan` prints it: one process's bits, the boundary's bytes."""
    run = cluster.clone / "runs" / "pdsh"
    words = pdsh(cluster, "pdsh", "--stages", "2", "--layout", "3d3d/3d3d", "--feed", "replicate")
    words += ["--save-every", str(STEPS)]
    command = cluster.hosts[0].start(*words)
    out, into = payload_per_step(command, run, cluster.hosts[0])
    assert command.wait(300) == 0, command.said
    check_equal(run, one)
    model = load_preset("debug").model
    boundary = 16 * 4 * (model.num_visible + 1) * model.embed_dim
    print(f"per step: {out:.0f} B out, {into:.0f} B in; the boundary has {boundary}")
    assert boundary <= out <= 1.06 * boundary, "and 2 kB of small collectives"
    assert boundary <= into <= 1.06 * boundary


def test_replicas_on_two_hosts(cluster: Cluster, one: Path) -> None:
    """ZeRO-2: gradients to their owners in 16 bits and weights back in as many."""
    run = cluster.clone / "runs" / "zero2"
    bf16 = ("--deepspeed_config", "ds_configs/a100_bf16.json")
    short = ("--steps", "24", "--save-every", "0")
    command = cluster.hosts[0].start(*pdsh(cluster, "zero2", *bf16, *short))
    out, into = payload_per_step(command, run, cluster.hosts[0], last=20)
    assert command.wait(300) == 0, command.said
    cost = model_cost(load_preset("debug").model)
    # gloo has no reduce-scatter: every rank gets every sum.
    formula = 2 * gradient_traffic_bytes(cost, 2) + weight_traffic_bytes(cost, 2, "16bit")
    print(f"per step: {out:.0f} B out, {into:.0f} B in; the formula says {formula}")
    assert out == pytest.approx(formula, rel=0.02)
    assert into == pytest.approx(formula, rel=0.02)


def test_two_by_two(cluster: Cluster, one: Path) -> None:
    """Two stages of two replicas; fp32 sums of two micro-batches each."""
    done = cluster.hosts[0].run(*pdsh(cluster, "2x2", "--stages", "2", slots=2))
    assert done.code == 0, done.said
    found = [row["loss"] for row in read_metrics(cluster.clone / "runs" / "2x2")]
    expected = [row["loss"] for row in read_metrics(one)]
    assert found == pytest.approx(expected, rel=1e-4)


@contextlib.contextmanager
def broken(host: Host, fault: str) -> Iterator[None]:
    """Something happens to a host, and is mended afterwards."""
    begin: Callable[[], None]
    begin, mend = {
        "killed rank": (lambda: kill_rank(host), lambda: None),
        "power off": (host.power_off, lambda: (host.boot(), host.link("up"))),
        "frozen host": (
            lambda: host.signal_all(signal.SIGSTOP),
            lambda: host.signal_all(signal.SIGCONT),
        ),
        "cut link": (lambda: host.link("down"), lambda: host.link("up")),
    }[fault]
    begin()
    try:
        yield
    finally:
        mend()


def kill_rank(host: Host) -> None:
    (victim,) = host.ranks()
    os.kill(victim, signal.SIGKILL)


@pytest.mark.parametrize("fault", ["killed rank", "power off", "frozen host", "cut link"])
def test_faults(cluster: Cluster, one: Path, fault: str) -> None:
    """Survivors and their launcher leave in time and say where; a restart ends with equal bits."""
    node1, node2 = cluster.hosts
    name = fault.replace(" ", "_")
    run = cluster.clone / "runs" / name
    words = pdsh(cluster, name, "--stages", "2")
    command = node1.start(*words, **KEEPALIVE)
    wait_for(lambda: rows(run) >= 15 or command.code is not None, 120, command.said)
    assert command.code is None, command.said
    began = time.monotonic()
    with broken(node2, fault):
        assert command.wait(6 * TIMEOUT) != 0, command.said
        print(f"{fault}: the launcher is back after {time.monotonic() - began:.1f} s")
        # The launcher is gone and so is the rank beside it, after a line that says where.
        line = SURVIVOR.format(rank=0, host="node1")
        wait_for(lambda: not node1.ranks(), TIMEOUT, "rank 0 outlives its launcher")
        assert re.search(line, command.said), command.said
        assert rows(run) < STEPS, "the fault came too late"
    if fault == "frozen host":
        line = SURVIVOR.format(rank=1, host="node2")
    wait_for(lambda: not node2.ranks(), 3 * TIMEOUT, "rank 1 is still there")
    again = node1.run(*words)
    assert again.code == 0, again.said
    assert "resuming after step" in again.said
    check_equal(run, one)


def test_lost_packets(cluster: Cluster, one: Path) -> None:
    """One in a hundred: slower, and nothing else."""
    for host in cluster.hosts:
        host.lose(10)
    try:
        done = cluster.hosts[0].run(*pdsh(cluster, "loss", "--stages", "2"))
    finally:
        for host in cluster.hosts:
            host.lose(0)
    assert done.code == 0, done.said
    check_equal(cluster.clone / "runs" / "loss", one)


def test_torchrun_restarts(cluster: Cluster, one: Path) -> None:
    """c10d on both hosts; a rank is killed, both sides start again, go on and end."""
    run = cluster.clone / "runs" / "torchrun"
    both = [
        host.start(
            *("torchrun", "--nnodes", "2", "--nproc_per_node", "1", *RENDEZVOUS, "--rdzv_id", "1"),
            *("--max-restarts", "3", SCRIPT, *TRAIN, "--stages", "2", "--timeout", str(TIMEOUT)),
            *("--output", str(run)),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        for host in cluster.hosts
    ]
    wait_for(lambda: rows(run) >= 15 or both[0].code is not None, 120, both[0].said)
    kill_rank(cluster.hosts[1])
    assert [command.wait(180) for command in both] == [0, 0], both[0].said + both[1].said
    assert "resuming after step" in both[0].said
    check_equal(run, one)


def test_hosts_with_other_data(cluster: Cluster, one: Path) -> None:
    """A folder of the same name on the second host's own disk lacks an image."""
    node1, node2 = cluster.hosts
    copy = cluster.folder / "other"
    photos = cluster.clone / "samples"
    shutil.copytree(photos, copy)
    next((copy / "train").rglob("*.jpg")).unlink()
    assert node2.shell(f"mount --bind {copy} {photos}").code == 0
    try:
        done = node1.run(*pdsh(cluster, "other_data", "--stages", "2"))
    finally:
        assert node2.shell(f"umount {photos}").code == 0
    assert done.code not in (0, None)
    assert "error: data=samples: node2: other images than node1 has" in done.said, done.said


@contextlib.contextmanager
def named_by_debian(cluster: Cluster) -> Iterator[Path]:
    """Each host's own name means 127.0.1.1 there; gives the launcher's file of settings."""
    known = (cluster.folder / "hosts").read_text()
    settings = cluster.clone / "launcher" / "deepspeed_env"
    before = settings.read_text()
    for host in cluster.hosts:
        names = cluster.folder / f"{host.name}.names"
        names.write_text(known.replace(f"10.77.0.{host.number} ", "127.0.1.1 "))
        assert host.shell(f"mount --bind {names} /etc/hosts").code == 0
    try:
        yield settings
    finally:
        settings.write_text(before)
        for host in cluster.hosts:
            assert host.shell("umount /etc/hosts").code == 0


def test_a_name_that_means_oneself(cluster: Cluster, one: Path) -> None:
    """Both ranks leave in time and say so; the launcher's setting helps."""
    node1, node2 = cluster.hosts
    with named_by_debian(cluster) as settings:
        done = node1.run(*pdsh(cluster, "debian", "--stages", "2"), seconds=12 * TIMEOUT)
        assert done.code not in (0, None)
        assert re.search("error: rank [01] on node[12], starting", done.said), done.said
        wait_for(lambda: not node1.ranks() and not node2.ranks(), 2 * TIMEOUT)
        settings.write_text(settings.read_text() + "GLOO_SOCKET_IFNAME=eth0\n")
        done = node1.run(*pdsh(cluster, "debian2", "--stages", "2", "--steps", "2"))
        assert done.code == 0, done.said


def test_a_study_behind_pdsh(cluster: Cluster, one: Path) -> None:
    """Its cells run on both hosts; a cell's error is told as it was."""
    hosts = cluster.hostfile(1)
    words = (
        *("deepmim-scale", "study", "--preset", "debug", "--depths", "4", "--stages", "2"),
        *("--schedules", "dib", "--steps", "3", "--warmup-steps", "1", "--gpus-per-node", "1"),
        *("--nodes", "2", "--hostfile", hosts, "--data", "samples", "--output", "runs/study"),
        *("--", "--kernels", "triton"),
    )
    done = cluster.hosts[0].run(*words)
    assert done.code == 1, done.said
    table = json.loads((cluster.clone / "runs" / "study" / "study.json").read_text())["rows"]
    assert {row["status"] for row in table} == {"failed"}
    assert all(row["note"].startswith("kernels=triton: needs a GPU") for row in table), table


def test_the_commands_of_the_documentation(cluster: Cluster, one: Path) -> None:
    """docs/cluster.md, "hosts": the doctor, then a run; what is typed on every host, on both."""
    node1, node2 = cluster.hosts
    for block in blocks("hosts"):
        done = node1.shell(f"set -e\n{block}")
        assert done.code == 0, done.said
    assert "node2: GPU 0 -> stage 1, replica 0 (rank 1)" in done.said
    (block,) = blocks("every-host")
    both = [host.start("bash", "-c", f"set -e\n{block}") for host in (node1, node2)]
    assert [command.wait(180) for command in both] == [0, 0], both[0].said + both[1].said
    for name in ("two_hosts", "torchrun_docs"):
        assert rows(cluster.clone / "runs" / name) == 20


def test_what_the_doctor_finds(cluster: Cluster, one: Path) -> None:
    """A folder of one host alone, and settings that nobody read; a card makes up for the name."""
    node1, node2 = cluster.hosts
    private = cluster.clone / "private"
    private.mkdir()
    assert node2.shell(f"mount -t tmpfs none {private}").code == 0
    with named_by_debian(cluster) as settings:
        # The ranks find each other by the card, not by their names.
        settings.write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
        start = ["deepspeed", "--hostfile", cluster.hostfile(1), "launcher/doctor.py"]
        done = node1.run(*start, "--output", "private", "--json", "runs/doctor.json")
    assert node2.shell(f"umount {private}").code == 0
    assert done.code not in (0, None), done.said
    content = json.loads((cluster.clone / "runs" / "doctor.json").read_text())
    bad = {row["check"]: row for row in content["findings"] if row["state"] == "bad"}
    assert set(bad) == {"launcher", "output folder"}, done.said
    assert "not seen from node2" in bad["output folder"]["found"]
    assert all(row["remedy"] for row in bad.values())
