"""Replays schedules in real processes whose kernels sleep, and compares with the simulation.

Every rank is a process on gloo that runs its instruction list: compute sleeps for the simulated
time, messages are real isend and irecv of the boundary tensor's size for one image. Needs no GPU
and few cores. Prints makespan and idle share, simulated and measured, and measured speed-ups.

    python benchmarks/schedule_replay.py --microbatches 4 8 --seconds 2 --json replay.json

With `--message-share 0.5` every message also takes half of what a stage computes for a micro-batch:
a thread for each channel sleeps before it sends. The last column then says which share of all
messages' time (the mean of the ranks), beyond the P - 1 messages that fill the pipe, is hidden.

Ends with exit code 1 when a measured median is more than 3 % away from the simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
    case: str, num_microbatches: int, seconds: float, message_share: float = 0.0
) -> tuple[str, list[BuiltSchedule], Sizes, Mapping[Any, float]]:
    """(layout, schedules, floats per message, seconds per message).

    Times are scaled so that 1f1b takes `seconds` where messages take none.
    """
    preset, taps, stages, placement, names = CASES[case]
    model = load_preset(preset).model
    if taps:
        model = model.replace(taps=taps)
    layout = layout_of(model, stages, placement)
    pipeline, memory = pipeline_of(model, layout, placement), memory_of(model, layout, 1)

    transfer: dict[Any, float] = {}

    def made(name: str, rate: float, share: float) -> BuiltSchedule:
        times = times_of(model, layout, 1, rate, split=find_schedule(name).split_backward)
        whole = times_of(model, layout, 1, rate).compute
        each = [
            sum(whole[kind, s] for kind in ("forward", "decoder", "encoder_backward"))
            for s in range(pipeline.num_stages)
        ]
        transfer.update(dict.fromkeys(times.transfer, max(each) * share))
        times = replace(times, transfer=dict(transfer))
        return build_schedule(name, SchedulingProblem(pipeline, num_microbatches, times, memory))

    rate = made(names[0], 1.0, 0.0).timeline.makespan / seconds
    sizes = {(m.payload, m.source): m.num_bytes // 4 for m in transfers_of(model, layout, 1)}
    builts = [made(name, rate, message_share) for name in names]
    return format_layout(layout, model), builts, sizes, transfer


class SlowChannels:
    """Sends that take as long as the simulation says, one after another on each channel."""

    def __init__(self, seconds: Mapping[Any, float]) -> None:
        self._seconds = seconds
        self._queues: dict[Any, queue.Queue[Any]] = {}
        self._threads: list[threading.Thread] = []

    def send(self, step: Any, start: Callable[[], Any]) -> None:
        """Call `start` after the message's time."""
        channel = step.message[:3]
        if channel not in self._queues:
            self._queues[channel] = queue.Queue()
            thread = threading.Thread(target=self._carry, args=(self._queues[channel],))
            thread.start()
            self._threads.append(thread)
        self._queues[channel].put((self._seconds.get(channel[:2], 0.0), start))

    def _carry(self, waiting: queue.Queue[Any]) -> None:
        while (entry := waiting.get()) is not None:
            seconds, start = entry
            time.sleep(seconds)
            start().wait()

    def finish(self) -> None:
        """Wait until all has left."""
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()


def replay(
    built: BuiltSchedule, sizes: Sizes, transfer: Mapping[Any, float], rank: int
) -> tuple[float, float]:
    """Run this rank's list once; (seconds until its end, seconds of compute)."""
    channels = SlowChannels(transfer)
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
            to = pipeline.rank_of(step.peer)
            channels.send(step, partial(dist.isend, sends[step], to, tag=tag(step)))
        else:
            begin = time.perf_counter()
            time.sleep(durations[step.kind, step.stage])
            busy += time.perf_counter() - begin
    end = time.perf_counter() - start
    channels.finish()
    return end, busy


def worker(
    rank: int,
    port: int,
    cases: list[tuple[list[BuiltSchedule], Sizes, Mapping[Any, float]]],
    results: Any,
) -> None:
    """One rank: every schedule REPEATS times, interleaved so that a slow moment hits all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(cases[0][0][0].schedule.ranks))
    measured: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for index, (builts, sizes, transfer) in enumerate(cases):
            for number, built in enumerate(builts):
                end, busy = replay(built, sizes, transfer, rank)
                longest, total = torch.tensor([end]), torch.tensor([busy])
                dist.all_reduce(longest, dist.ReduceOp.MAX)
                dist.all_reduce(total)
                idle = 1 - total.item() / len(built.schedule.ranks) / longest.item()
                measured.setdefault((index, number), []).append((longest.item(), idle))
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def hidden(
    built: BuiltSchedule, alone: BuiltSchedule, transfer: Mapping[Any, float], seconds: float
) -> float:
    """Share of the messages' time that does not lengthen the step; 1 where they take none."""
    sends = [step for rank in built.schedule.ranks for step in rank if step.kind == "send"]
    messages, ranks = [step.message for step in sends], len(built.schedule.ranks)
    total = sum(transfer.get(message[:2], 0.0) for message in messages)
    if not total:
        return 1.0
    fill = (ranks - 1) * max(transfer.values())
    return 1 - (seconds - alone.timeline.makespan - fill) / (total / ranks)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_case(
    case: str, microbatches: list[int], seconds: float, share: float
) -> list[dict[str, Any]]:
    """Replay one case for several M in one set of processes; prints and returns rows."""
    prepared = [schedules(case, m, seconds, share) for m in microbatches]
    context = mp.get_context("spawn")
    results = context.Queue()
    num_ranks = len(prepared[0][1][0].schedule.ranks)
    arguments = (free_port(), [tuple(entry[1:]) for entry in prepared], results)
    processes = [context.Process(target=worker, args=(r, *arguments)) for r in range(num_ranks)]
    for process in processes:
        process.start()
    measured = results.get(timeout=600)
    for process in processes:
        process.join()

    rows = []
    for index, (layout, builts, _, transfer) in enumerate(prepared):
        alone = schedules(case, microbatches[index], seconds)[1]
        print(f"\n{CASES[case][0]} {layout}, {num_ranks} processes, M={microbatches[index]}")
        print("schedule  simulated/s  measured/s  ratio  idle simulated  measured  faster  hidden")
        medians = [
            tuple(statistics.median(column) for column in zip(*measured[index, n], strict=True))
            for n in range(len(builts))
        ]
        for built, without, (seconds_measured, idle) in zip(builts, alone, medians, strict=True):
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
                "message_share": share,
                "hidden": hidden(built, without, transfer, seconds_measured),
            }
            rows.append(row)
            print(
                f"{row['schedule']:8s} {row['simulated_seconds']:12.3f} {seconds_measured:11.3f} "
                f"{seconds_measured / row['simulated_seconds']:6.3f} {row['simulated_idle']:15.1%} "
                f"{idle:9.1%} {row['speedup_over_1f1b']:9.2f} {row['hidden']:7.1%}"
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
    parser.add_argument(
        "--message-share", type=float, default=0.0, help="a message's time over a stage's"
    )
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo")
    rows = [
        row
        for c in args.cases
        for row in run_case(c, args.microbatches, args.seconds, args.message_share)
    ]
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    worst = max(abs(row["measured_seconds"] / row["simulated_seconds"] - 1) for row in rows)
    print(f"\nlargest deviation from the simulation: {worst:.1%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
