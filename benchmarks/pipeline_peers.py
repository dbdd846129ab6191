"""Our pipelines against torch.distributed.pipelining and DeepSpeed's PipelineModule.

The same stages, decoders, losses and micro-batches, in real processes on gloo, one step of each
after another so that a slow moment hits all:

    python benchmarks/pipeline_peers.py --json peers.json

| part | kernels | what it shows |
|---|---|---|
| `sleep` | wait for fixed lengths, which are printed | seconds of a step, idle share |
| `empty` | width 16 | CPU ms of a step, which is Python |
| `small` | 196 patches, a quarter of ViT-B's width | largest saved activations of a rank, MB |

Needs no GPU and few cores: what sleeps does not compute. Ends with exit code 1 where losses of the
first step differ between the variants.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import resource
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peer_pipelines import variants
from peer_work import Kernels, Slept, Work
from saved_activations import peak_saved_bytes

from deepmim_scale.parallel import zero

PARTS: tuple[Kernels, ...] = ("sleep", "empty", "small")
BASELINE, THEIR_BASELINE = "ours 1f1b", "torch 1F1B"
PEERS = ("torch", "DeepSpeed")
# Python's own time needs many steps to be seen; memory needs one.
STEPS: dict[Kernels, int] = {"sleep": 1, "empty": 20, "small": 1}
SAME_LOSS = 1e-5
Row = dict[str, Any]


def cpu_seconds() -> float:
    """CPU time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def run_part(work: Work, rounds: int) -> dict[str, Row]:
    """All variants of one kind of kernels on this rank; the same rows on every rank."""
    built = {name: build() for name, build in variants(work).items()}
    rows: dict[str, Row] = {
        name: {"seconds": [], "cpu_ms": [], "idle": [], "activation_mb": 0.0} for name in built
    }
    # The first step of each allocates and connects; its losses tell whether the work is the same.
    for name, variant in built.items():
        losses = {k: float(v) for part in gathered(variant.step()) for k, v in part.items()}
        rows[name]["loss"] = sum(losses.values()) / work.num_microbatches
    if work.kernels == "small":
        for name, variant in built.items():
            variant.module.zero_grad()
            peak = peak_saved_bytes(variant.module, variant.step)
            rows[name]["activation_mb"] = max(gathered(peak)) / 1e6
        return rows
    steps = STEPS[work.kernels]
    for _ in range(rounds):
        for name, variant in built.items():
            variant.module.zero_grad()
            dist.barrier()
            Slept.seconds, began, cpu = 0.0, time.perf_counter(), cpu_seconds()
            for _ in range(steps):
                variant.step()
            seconds = (time.perf_counter() - began) / steps
            mine = seconds, Slept.seconds / steps, 1e3 * (cpu_seconds() - cpu) / steps
            wall, slept, cpus = zip(*gathered(mine), strict=True)
            rows[name]["seconds"].append(max(wall))
            rows[name]["idle"].append(1 - statistics.mean(slept) / max(wall))
            rows[name]["cpu_ms"].append(statistics.mean(cpus))
    return rows


def worker(rank: int, num_ranks: int, port: int, works: list[Work], rounds: int, out: Any) -> None:
    """One rank: all parts, one after another."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    zero.init_processes(timeout_seconds=300)
    found = [run_part(work, rounds) for work in works]
    if rank == 0:
        out.put(found)
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(num_ranks: int, works: list[Work], rounds: int) -> dict[str, dict[str, Row]]:
    """Rows by part and name, from one set of processes."""
    context = mp.get_context("spawn")
    out = context.Queue()
    arguments = (num_ranks, free_port(), works, rounds, out)
    processes = [context.Process(target=worker, args=(r, *arguments)) for r in range(num_ranks)]
    for process in processes:
        process.start()
    # What a rank prints before it fails is on the terminal already.
    found = None
    while found is None:
        try:
            found = out.get(timeout=5)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.terminate()
                raise SystemExit("a rank failed") from None
    for process in processes:
        process.join()
    return {work.kernels: rows for work, rows in zip(works, found, strict=True)}


def ratio(rows: dict[str, Row], key: str, other: str, name: str) -> float:
    """Median over the rounds of other / name."""
    pairs = zip(rows[other][key], rows[name][key], strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(parts: dict[str, dict[str, Row]]) -> dict[str, float | str]:
    """Ours against the fastest peer."""
    slept, empty, small = parts["sleep"], parts["empty"], parts["small"]
    peers = [name for name in slept if name.startswith(PEERS)]
    best = min(peers, key=lambda name: statistics.median(slept[name]["seconds"]))
    own = [name for name in slept if not name.startswith(PEERS)]
    fastest = min(own, key=lambda name: statistics.median(slept[name]["seconds"]))
    return {
        "best_peer": best,
        "fastest_of_ours": fastest,
        "speedup_over_best_peer": ratio(slept, "seconds", best, fastest),
        "speedup_of_dib": ratio(slept, "seconds", best, "ours dib"),
        "activations_of_best_peer_over_ours": small[best]["activation_mb"]
        / small[fastest]["activation_mb"],
        "cpu_of_our_1f1b_over_torchs": ratio(empty, "cpu_ms", BASELINE, THEIR_BASELINE),
    }


def show(num_ranks: int, count: int, parts: dict[str, dict[str, Row]]) -> None:
    """The table of one number of ranks."""
    print(f"\nP={num_ranks}, M={count}")
    print("| pipeline | s per step | idle | CPU ms | saved activations MB | loss |")
    print("|---|---|---|---|---|---|")
    for name, row in parts["sleep"].items():
        print(
            f"| {name} | {statistics.median(row['seconds']):.3f} "
            f"| {statistics.median(row['idle']):.1%} "
            f"| {statistics.median(parts['empty'][name]['cpu_ms']):.1f} "
            f"| {parts['small'][name]['activation_mb']:.1f} "
            f"| {parts['small'][name]['loss']:.6f} |"
        )
    for key, value in summary(parts).items():
        print(f"{key}: {value if isinstance(value, str) else f'{value:.3f}'}", flush=True)


def main() -> int:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4), default=[4, 2])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="1F1B's simulated step, P=4 M=8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    works = [Work(kernels, args.microbatches, args.seconds) for kernels in PARTS]
    for what, lengths in zip(("block", "decoder"), works[0].lengths, strict=True):
        print(f"{what}: " + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in vars(lengths).items()))
    content: dict[str, Any] = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "lengths_ms": [{k: 1e3 * v for k, v in vars(one).items()} for one in works[0].lengths],
        "cases": {},
    }
    equal = True
    for num_ranks in args.ranks:
        parts = measure(num_ranks, works, args.rounds)
        show(num_ranks, args.microbatches, parts)
        found = summary(parts)
        content["cases"][f"P={num_ranks}"] = {"parts": parts, **found}
        if num_ranks == args.ranks[0]:
            content |= found
        for rows in parts.values():
            losses = [row["loss"] for row in rows.values()]
            equal &= max(losses) - min(losses) < SAME_LOSS * max(losses)
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=1))
    if not equal:
        print("losses differ: the variants do not do the same work")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
