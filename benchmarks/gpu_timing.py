"""Timing on a GPU: events, graph replays, the copy that everything is compared with, CSV rows."""

import csv
import datetime
import itertools
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Inputs = dict[str, Any]
Step = Callable[[Inputs], object]
Row = dict[str, Any]


def timed(step: Step, sets: list[Inputs], steps: int = 200) -> list[float]:
    """Sorted milliseconds of single steps by CUDA events, after a warm-up."""
    for inputs in sets * 2:
        step(inputs)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
    for inputs, (before, after) in zip(itertools.cycle(sets), events, strict=False):
        before.record()
        step(inputs)
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in events)


def recorded(step: Step, sets: list[Inputs]) -> Step:
    """The step as replays of CUDA graphs, one per input set.

    A fused loss takes tens of microseconds and its call from Python several times that: without
    graphs the events would measure Python.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and leaves nothing lazy for the capture
        for inputs in sets:
            step(inputs)
    torch.cuda.synchronize()
    # Replays follow one another and nobody reads their results, so they may share memory.
    pool = torch.cuda.graph_pool_handle()
    graphs = {id(inputs): torch.cuda.CUDAGraph() for inputs in sets}
    for inputs in sets:
        with torch.cuda.graph(graphs[id(inputs)], pool=pool):
            step(inputs)
    return lambda inputs: graphs[id(inputs)].replay()


def percentiles(times: list[float]) -> Row:
    """Median, 20th and 80th percentile of sorted milliseconds."""
    return {
        "median_ms": round(statistics.median(times), 4),
        "p20_ms": round(times[len(times) // 5], 4),
        "p80_ms": round(times[len(times) * 4 // 5], 4),
    }


def copy_bandwidth() -> float:
    """Bytes per second of a device copy of 1 GiB, reads and writes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = timed(lambda x: target.copy_(source), [{}])
    return 2 * source.numel() / (statistics.median(times) / 1e3)


def peak_mib(step: Step, inputs: Inputs) -> float:
    """MiB allocated by one step beyond its inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment() -> Row:
    """What a row of results needs to be repeated: GPU, versions, commit, date."""
    import triton

    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def write_csv(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
