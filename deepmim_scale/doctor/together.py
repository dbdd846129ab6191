"""Checks that take all ranks: their versions, clocks and folders, and how fast they talk.

Legend: P stages, D replicas.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.doctor.findings import Finding, bad, not_here, ok, same_everywhere
from deepmim_scale.errors import UserError
from deepmim_scale.parallel.grid import ProcessGrid, make_group
from deepmim_scale.parallel.p2p import Channel, rounds_of
from deepmim_scale.runs.environment import describe_environment

MIB = 2**20
CLOCK_SECONDS = 1.0
SECONDS_TO_SEE_A_FILE = 30.0
LEAST_SHARE = 0.5
"""Of the network that is asked for; gloo over TCP reaches 0.65 to 0.81 in collectives."""


def gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_versions() -> Finding:
    """One Python, torch, DeepSpeed and commit on all hosts."""
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    mine = f"Python {platform.python_version()}, torch {versions[0]}, deepspeed {versions[1]}"
    mine += f", commit {describe_environment()['commit']}"
    remedy = "install the same everywhere, or give one environment on a shared disk"
    return same_everywhere("versions", gathered((socket.gethostname(), mine)), remedy)


def check_threads() -> Finding:
    """Sums depend on the number of threads, so it must be the same."""
    mine = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    remedy = "export DS_ENV_FILE=$PWD/launcher/deepspeed_env, or source launcher/environment.sh"
    if "unset" in mine:
        mine += f", {torch.get_num_threads()} threads"
    return same_everywhere("threads", gathered((socket.gethostname(), mine)), remedy)


def check_clocks() -> Finding:
    """Hosts' clocks against each other: locks and logs compare them."""
    dist.barrier()
    now = time.time()
    dist.barrier()
    times = gathered((socket.gethostname(), now))
    spread = max(value for _, value in times) - min(value for _, value in times)
    text = f"{spread * 1e3:.0f} ms apart, the barrier's own time included"
    if spread <= CLOCK_SECONDS:
        return ok("clocks", text)
    return bad("clocks", text, "run chrony or ntpd on all hosts")


def check_output(output: Path) -> Finding:
    """Whether all hosts see what the first one writes."""
    check, token = "output folder", output / ".doctor"
    try:
        if dist.get_rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            token.write_text(str(os.getpid()))
        problem = ""
    except OSError as error:
        problem = f"{output}: {error.strerror}"
    problem, expected = gathered((problem, str(os.getpid())))[0]
    if problem:
        return bad(check, problem, "give a folder that can be written: --output")

    def seen() -> bool:
        try:
            return token.read_text() == expected
        except OSError:
            return False

    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE  # NFS remembers what it did not find
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = sorted({host for host, sees in gathered((socket.gethostname(), seen())) if not sees})
    if dist.get_rank() == 0:
        token.unlink()
    if blind:
        return bad(check, f"{output}: not seen from {', '.join(blind)}", "share it among all hosts")
    return ok(check, f"{output}: seen from all hosts")


def _seconds(work: Callable[[], object], device: torch.device, times: int = 4) -> float:
    """Of one call; the slowest rank's, and not the first one's, which connects."""
    work()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return float(max(gathered(time.perf_counter() - began))) / times


def _judge(check: str, text: str, gbytes: float, network: float) -> Finding:
    share = gbytes / network if network else 1.0
    text += f", {gbytes:.2f} GB/s" + (f", {share:.0%} of --network" if network else "")
    if share >= LEAST_SHARE:
        return ok(check, text)
    return bad(check, text, "check NCCL_SOCKET_IFNAME, NCCL_IB_HCA, and cables; plan with less")


def divides(num_stages: int) -> None:
    """UserError unless pipelines of so many stages take all processes."""
    world = dist.get_world_size()
    if world % num_stages:
        raise UserError(f"stages={num_stages}: must divide the {world} processes; change one")


def check_all_reduce(device: torch.device, network: float) -> Finding:
    """Sum over all ranks: bytes that each sends and receives in a ring per second."""
    check, world = "all-reduce", dist.get_world_size()
    if world == 1:
        return not_here(check, "one process")
    size = (256 if device.type == "cuda" else 16) * MIB
    values = torch.ones(size // 4, device=device)
    seconds = _seconds(lambda: dist.all_reduce(values), device)
    passed = 2 * (world - 1) / world * size
    return _judge(check, f"{dist.get_backend()}, {world} ranks", passed / seconds / 1e9, network)


def check_channels(
    num_stages: int, device: torch.device, timeout: float, network: float
) -> Finding:
    """Messages between neighboring stages, each way on a communicator of its own; the slowest."""
    check = f"channels of {num_stages} stages"
    if num_stages == 1:
        return not_here(check, "one stage sends none")
    pipelines = ProcessGrid(num_stages).pipe_groups
    me = dist.get_rank()
    mine = next(ranks for ranks in pipelines if me in ranks)
    gloo = dist.get_backend() == "gloo"
    size = (64 if device.type == "cuda" else 8) * MIB
    tensor = torch.ones(size // 4, device="cpu" if gloo else device)
    channels: list[Channel] = []
    for stage in range(num_stages - 1):
        channels += [("activation", stage, stage + 1), ("gradient", stage + 1, stage)]
    slowest = 0.0
    for some in rounds_of(channels):
        pairs = [[ranks[s], ranks[t]] for ranks in pipelines for _, s, t in some]
        group = make_group(pairs, timedelta(seconds=timeout))
        seconds = _seconds(lambda: _pass(tensor, mine, some, group), device)  # noqa: B023
        slowest = max(slowest, seconds)
        dist.destroy_process_group(group)
    text = f"{dist.get_backend()}, slowest of {len(channels)}"
    return _judge(check, text, size / slowest / 1e9, network)


def _pass(tensor: Tensor, ranks: list[int], channels: list[Channel], group: Any) -> None:
    """Send or receive on the one channel of this rank, if it has one."""
    me = dist.get_rank()
    for _, source, target in channels:
        if me == ranks[source]:
            dist.send(tensor, ranks[target], group=group)
        elif me == ranks[target]:
            dist.recv(tensor, ranks[source], group=group)
