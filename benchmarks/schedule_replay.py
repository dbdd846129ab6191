"""Replays schedules in real processes whose kernels sleep, and compares with the simulation.

Every rank is a process on gloo that runs its instruction list: compute sleeps for the simulated
time, messages are real isend and irecv of the boundary tensor's size for one image. Needs no GPU
and few cores. Prints makespan and idle share, simulated and measured, and measured speed-ups.

    python benchmarks/schedule_replay.py --microbatches 4 8 --seconds 2 --json replay.json

Ends with exit code 1 when a measured median is more than 3 % away from the simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem
from deepmim_scale.pipeline.registry import build_schedule, find_schedule
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.partition import format_layout
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of
from deepmim_scale.presets import load_preset

# Preset, taps, ranks, placement, schedules (the first is what the others are compared with).
LINEAR = ("1f1b", "zb_h1", "dib", "dib_w")
CASES = {
    "b12": ("deepmim_vit_b_12", "even", 4, "linear", LINEAR),
    "b48": ("deepmim_vit_b_48", "even:8", 8, "linear", LINEAR),
    "mirl": ("mirl_vit_b_48", "", 3, "v", ("1f1b", "dib")),
}
Sizes = dict[tuple[str, int], int]
TOLERANCE = 0.03
REPEATS = 5


def schedules(
    case: str, num_microbatches: int, seconds: float
) -> tuple[str, list[BuiltSchedule], Sizes]:
    """(layout, schedules with times scaled so that 1f1b takes `seconds`, floats per message)."""
    preset, taps, stages, placement, names = CASES[case]
    model = load_preset(preset).model
    if taps:
        model = model.replace(taps=taps)
    layout = layout_of(model, stages, placement)
    pipeline, memory = pipeline_of(model, layout, placement), memory_of(model, layout, 1)

    def made(name: str, rate: float) -> BuiltSchedule:
        times = times_of(model, layout, 1, rate, split=find_schedule(name).split_backward)
        return build_schedule(name, SchedulingProblem(pipeline, num_microbatches, times, memory))

    rate = made(names[0], 1.0).timeline.makespan / seconds
    sizes = {(m.payload, m.source): m.num_bytes // 4 for m in transfers_of(model, layout, 1)}
    return format_layout(layout, model), [made(name, rate) for name in names], sizes


def replay(built: BuiltSchedule, sizes: Sizes, rank: int) -> tuple[float, float]:
    """Run this rank's list once; (seconds until its end, seconds of compute)."""
    pipeline = built.schedule.pipeline
    durations = {
        (e.instruction.kind, e.instruction.stage): e.end - e.start
        for e in built.timeline.events
        if e.instruction.payload is None
    }
    payloads = ("activation", "gradient", "prediction", "prediction_gradient")
    instructions = built.schedule.ranks[rank]

    def tag(step: Any) -> int:
        payload, source, _, microbatch = step.message
        return (payloads.index(payload) * 16 + source) * 1024 + microbatch

    def tensor(step: Any) -> torch.Tensor:
        return torch.zeros(sizes[step.payload, step.message[1]])

    sends = {step: tensor(step) for step in instructions if step.kind == "send"}
    rooms = {step.message: tensor(step) for step in instructions if step.kind == "receive"}
    posted: dict[Any, Any] = {}
    pending = []
    dist.barrier()
    start = time.perf_counter()
    busy = 0.0
    for step in instructions:
        if step.kind == "receive":
            room, source = rooms[step.message], pipeline.rank_of(step.peer)
            posted[step.message] = dist.irecv(room, source, tag=tag(step))
        elif step.kind == "wait":
            posted[step.message].wait()
        elif step.kind == "send":
            pending.append(dist.isend(sends[step], pipeline.rank_of(step.peer), tag=tag(step)))
        else:
            begin = time.perf_counter()
            time.sleep(durations[step.kind, step.stage])
            busy += time.perf_counter() - begin
    end = time.perf_counter() - start
    for work in pending:
        work.wait()
    return end, busy


def worker(
    rank: int, port: int, cases: list[tuple[list[BuiltSchedule], Sizes]], results: Any
) -> None:
    """One rank: every schedule REPEATS times, interleaved so that a slow moment hits all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(cases[0][0][0].schedule.ranks))
    measured: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for index, (builts, sizes) in enumerate(cases):
            for number, built in enumerate(builts):
                end, busy = replay(built, sizes, rank)
                longest, total = torch.tensor([end]), torch.tensor([busy])
                dist.all_reduce(longest, dist.ReduceOp.MAX)
                dist.all_reduce(total)
                idle = 1 - total.item() / len(built.schedule.ranks) / longest.item()
                measured.setdefault((index, number), []).append((longest.item(), idle))
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_case(case: str, microbatches: list[int], seconds: float) -> list[dict[str, Any]]:
    """Replay one case for several M in one set of processes; prints and returns rows."""
    prepared = [schedules(case, m, seconds) for m in microbatches]
    context = mp.get_context("spawn")
    results = context.Queue()
    num_ranks = len(prepared[0][1][0].schedule.ranks)
    arguments = (free_port(), [(builts, sizes) for _, builts, sizes in prepared], results)
    processes = [context.Process(target=worker, args=(r, *arguments)) for r in range(num_ranks)]
    for process in processes:
        process.start()
    measured = results.get(timeout=600)
    for process in processes:
        process.join()

    rows = []
    for index, (layout, builts, _) in enumerate(prepared):
        print(f"\n{CASES[case][0]} {layout}, {num_ranks} processes, M={microbatches[index]}")
        print("schedule  simulated/s  measured/s  ratio  idle simulated  measured  speed-up")
        medians = [
            tuple(statistics.median(column) for column in zip(*measured[index, n], strict=True))
            for n in range(len(builts))
        ]
        for built, (seconds_measured, idle) in zip(builts, medians, strict=True):
            row = {
                "case": case,
                "layout": layout,
                "ranks": num_ranks,
                "microbatches": microbatches[index],
                "schedule": built.schedule.name,
                "simulated_seconds": built.timeline.makespan,
                "measured_seconds": seconds_measured,
                "simulated_idle": built.timeline.idle_fraction,
                "measured_idle": idle,
                "speedup_over_1f1b": medians[0][0] / seconds_measured,
            }
            rows.append(row)
            print(
                f"{row['schedule']:8s} {row['simulated_seconds']:12.3f} {seconds_measured:11.3f} "
                f"{seconds_measured / row['simulated_seconds']:6.3f} {row['simulated_idle']:15.1%} "
                f"{idle:9.1%} {row['speedup_over_1f1b']:9.2f}"
            )
        speedups = [f"{medians[0][0] / seconds:.2f}" for seconds, _ in medians]
        print(f"{' : '.join(b.schedule.name for b in builts)} = {' : '.join(speedups)}", flush=True)
    return rows


def main() -> int:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--microbatches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="1f1b's simulated makespan")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo")
    rows = [row for c in args.cases for row in run_case(c, args.microbatches, args.seconds)]
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    worst = max(abs(row["measured_seconds"] / row["simulated_seconds"] - 1) for row in rows)
    print(f"\nlargest deviation from the simulation: {worst:.1%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
