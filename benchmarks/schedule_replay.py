"""Replays schedules in real processes whose kernels sleep, and compares with the simulation.

Every rank is a process on gloo that runs its instruction list: compute sleeps for the simulated
time, messages are real isend and irecv of the boundary tensor's size for one image. Needs no GPU
and few cores. Prints makespan and idle share, simulated and measured, and measured speed-ups.

    python benchmarks/schedule_replay.py --microbatches 4 8 --seconds 2 --json replay.json

With `--message-share 0.5` every message also takes half of what a stage computes for a micro-batch:
a thread for each channel sleeps before it sends. The last column then says which share of all
messages' time (the mean of the ranks), beyond the P - 1 messages that fill the pipe, is hidden.

With `--reduction-share 0.25` each rank also sums its gradients over replicas: a thread sleeps for
a quarter of what a stage computes for a micro-batch, piece by piece as gradients appear, and the
flush waits for it. The column `sums` says which share of that the step does not get longer by.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from slow_parts import SlowChannels, Sums

from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem
from deepmim_scale.pipeline.ir import Durations, Reduction
from deepmim_scale.pipeline.registry import build_schedule, find_schedule
from deepmim_scale.plan.cost import stage_cost
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.partition import format_layout
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of
from deepmim_scale.presets import load_preset

# Preset, taps, ranks, placement, schedules (the first is what the others are compared with).
LINEAR = ("1f1b", "zb_h1", "dib", "dib_w")
CASES = {
    "b12": ("deepmim_vit_b_12", "even", 4, "linear", LINEAR),
    "b48": ("deepmim_vit_b_48", "even:8", 8, "linear", LINEAR),
    "b12_1": ("deepmim_vit_b_12", "even", 1, "linear", ("dib",)),
    "mirl": ("mirl_vit_b_48", "", 3, "v", ("1f1b", "dib")),
}
Sizes = dict[tuple[str, int], int]
TOLERANCE = 0.03
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """What is replayed for one number of micro-batches."""

    layout: str
    built: list[BuiltSchedule]
    durations: list[Durations]
    """Of each schedule."""
    plain: list[BuiltSchedule]
    """The schedules without messages and sums, replayed too where either takes time."""
    plain_durations: list[Durations]
    sizes: Sizes
    """Floats of a message."""

    @property
    def runs(self) -> list[tuple[BuiltSchedule, Durations]]:
        """What is replayed."""
        slow = any(sum(times.transfer.values()) for times in self.durations)
        slow |= any(step.kind == "reduce_encoder" for step in self.built[0].schedule.ranks[0])
        found = [*zip(self.built, self.durations, strict=True)]
        return found + [*zip(self.plain, self.plain_durations, strict=True)] * slow


def prepare(
    case: str, num_microbatches: int, seconds: float, message_share: float, sum_share: float
) -> Case:
    """Schedules whose times are such that the first takes `seconds` without messages and sums."""
    preset, taps, stages, placement, names = CASES[case]
    model = load_preset(preset).model
    if taps:
        model = model.replace(taps=taps)
    layout = layout_of(model, stages, placement)
    pipeline, memory = pipeline_of(model, layout, placement), memory_of(model, layout, 1)

    def timed(name: str, rate: float, messages: float, sums: float) -> Durations:
        times = times_of(model, layout, 1, rate, split=find_schedule(name).split_backward)
        whole = times_of(model, layout, 1, rate).compute
        longest = max(
            sum(whole[kind, s] for kind in ("forward", "decoder", "encoder_backward"))
            for s in range(pipeline.num_stages)
        )
        # In proportion to parameters; the largest rank's take the share that is asked for.
        costs = [stage_cost(model, stage.first, stage.last) for stage in layout]
        largest = max(
            sum(costs[s].whole.trainable for s in pipeline.stages_of(rank))
            for rank in range(pipeline.num_ranks)
        )
        compute = dict(times.compute)
        for s, cost in enumerate(costs):
            for kind, part in ("reduce_encoder", cost.encoder), ("reduce_decoders", cost.decoders):
                compute[kind, s] = longest * sums * part.trainable / largest
        return replace(
            times, compute=compute, transfer=dict.fromkeys(times.transfer, longest * messages)
        )

    def made(name: str, times: Durations, reduction: Reduction | None) -> BuiltSchedule:
        return build_schedule(
            name,
            SchedulingProblem(pipeline, num_microbatches, times, memory, reduction=reduction),
        )

    rate = made(names[0], timed(names[0], 1.0, 0.0, 0.0), None).timeline.makespan / seconds
    durations = [timed(name, rate, message_share, sum_share) for name in names]
    plain = [timed(name, rate, 0.0, 0.0) for name in names]
    reduction: Reduction | None = "overlapped" if sum_share else None
    return Case(
        format_layout(layout, model),
        [made(name, times, reduction) for name, times in zip(names, durations, strict=True)],
        durations,
        [made(name, times, None) for name, times in zip(names, plain, strict=True)],
        plain,
        {(m.payload, m.source): m.num_bytes // 4 for m in transfers_of(model, layout, 1)},
    )


def replay(
    built: BuiltSchedule, sizes: Sizes, durations: Durations, rank: int
) -> tuple[float, float]:
    """Run this rank's list once; (seconds until its end, seconds of compute)."""
    channels, sums = SlowChannels(durations.transfer), Sums(built, durations)
    pipeline = built.schedule.pipeline
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
        elif step.kind in ("reduce_encoder", "reduce_decoders"):
            sums.reduce(step)
        elif step.kind != "flush":
            begin = time.perf_counter()
            sums.compute(step, durations.of(step))
            busy += time.perf_counter() - begin
    sums.finish()
    end = time.perf_counter() - start
    channels.finish()
    return end, busy


def worker(
    rank: int,
    port: int,
    cases: list[Case],
    results: Any,
) -> None:
    """One rank: every schedule REPEATS times, interleaved so that a slow moment hits all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(cases[0].built[0].schedule.ranks))
    measured: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for index, case in enumerate(cases):
            for number, (built, durations) in enumerate(case.runs):
                end, busy = replay(built, case.sizes, durations, rank)
                longest, total = torch.tensor([end]), torch.tensor([busy])
                dist.all_reduce(longest, dist.ReduceOp.MAX)
                dist.all_reduce(total)
                idle = 1 - total.item() / len(built.schedule.ranks) / longest.item()
                measured.setdefault((index, number), []).append((longest.item(), idle))
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def hidden(built: BuiltSchedule, durations: Durations, longer: float) -> tuple[float, float]:
    """Shares of (messages, sums) that do not lengthen the step, which got `longer`; 1 for none.

    Only one of them should take time. The mean of the ranks counts for messages, beyond the P - 1
    that fill the pipe; the rank with the most for sums.
    """
    sends = [step for rank in built.schedule.ranks for step in rank if step.kind == "send"]
    ranks, pipeline = len(built.schedule.ranks), built.schedule.pipeline
    each = [durations.transfer.get(step.message[:2], 0.0) for step in sends]
    fill = (ranks - 1) * max(durations.transfer.values(), default=0.0)
    messages = 1 - (longer - fill) / (sum(each) / ranks) if sum(each) else 1.0
    summed = max(
        durations.compute["reduce_encoder", s] + durations.compute["reduce_decoders", s]
        for s in range(pipeline.num_stages)
    )
    return messages, 1 - longer / summed if summed else 1.0


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_case(
    case: str, microbatches: list[int], seconds: float, shares: tuple[float, float]
) -> list[dict[str, Any]]:
    """Replay one case for several M in one set of processes; prints and returns rows."""
    prepared = [prepare(case, m, seconds, *shares) for m in microbatches]
    context = mp.get_context("spawn")
    results = context.Queue()
    num_ranks = len(prepared[0].built[0].schedule.ranks)
    arguments = (free_port(), prepared, results)
    processes = [context.Process(target=worker, args=(r, *arguments)) for r in range(num_ranks)]
    for process in processes:
        process.start()
    measured = results.get(timeout=600)
    for process in processes:
        process.join()

    rows = []
    for index, found in enumerate(prepared):
        count = microbatches[index]
        print(f"\n{CASES[case][0]} {found.layout}, {num_ranks} processes, M={count}")
        print(
            "schedule  simulated/s  measured/s  ratio  idle simulated  measured  faster"
            "  messages hidden  simulated  sums hidden  simulated"
        )
        medians = [
            tuple(statistics.median(column) for column in zip(*measured[index, n], strict=True))
            for n in range(len(found.runs))
        ]
        number = len(found.built)
        for built, durations, plain, (took, idle), (alone, _) in zip(
            found.built,
            found.durations,
            found.plain,
            medians[:number],
            medians[-number:],
            strict=True,
        ):
            expected = built.timeline.makespan
            messages, sums = hidden(built, durations, took - alone)
            longer = expected - plain.timeline.makespan
            messages_expected, sums_expected = hidden(built, durations, longer)
            row = {
                "case": case,
                "layout": found.layout,
                "ranks": num_ranks,
                "microbatches": count,
                "schedule": built.schedule.name,
                "simulated_seconds": expected,
                "measured_seconds": took,
                "simulated_idle": built.timeline.idle_fraction,
                "measured_idle": idle,
                "speedup_over_1f1b": medians[0][0] / took,
                "message_share": shares[0],
                "reduction_share": shares[1],
                "messages_hidden": messages,
                "messages_hidden_simulated": messages_expected,
                "sums_hidden": sums,
                "sums_hidden_simulated": sums_expected,
            }
            rows.append(row)
            print(
                f"{row['schedule']:8s} {expected:12.3f} {took:11.3f} {took / expected:6.3f} "
                f"{row['simulated_idle']:15.1%} {idle:9.1%} {row['speedup_over_1f1b']:7.2f} "
                f"{messages:16.1%} {messages_expected:10.1%} {sums:12.1%} {sums_expected:10.1%}"
            )
        speedups = [f"{medians[0][0] / seconds:.2f}" for seconds, _ in medians[:number]]
        names = " : ".join(built.schedule.name for built in found.built)
        print(f"{names} = {' : '.join(speedups)}", flush=True)
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
    parser.add_argument(
        "--reduction-share", type=float, default=0.0, help="a rank's sums over a stage's time"
    )
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo")
    rows = [
        row
        for c in args.cases
        for row in run_case(
            c, args.microbatches, args.seconds, (args.message_share, args.reduction_share)
        )
    ]
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    worst = max(abs(row["measured_seconds"] / row["simulated_seconds"] - 1) for row in rows)
    print(f"\nlargest deviation from the simulation: {worst:.1%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
