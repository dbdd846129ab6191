"""Discrete-event simulation of instruction lists: makespan, idle share, activation bytes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from deepmim_scale.pipeline.ir import (
    COMPUTE_KINDS,
    Durations,
    Instruction,
    Message,
    Payload,
    Schedule,
    last_gradients,
)


@dataclass(frozen=True)
class Memory:
    """Activation bytes of one micro-batch on one stage."""

    encoder: int
    """Saved by the encoder slice from forward to the end of its backward, with the tap gradients
    that wait for it."""
    decoders: int
    """Saved by all decoders of the stage together."""
    largest_decoder: int
    """Saved by the largest decoder alone: the `decoder` instruction runs one after the other."""
    messages: Mapping[Payload, int] = field(default_factory=dict)
    """Of a message to this stage, by payload: room that a posted receive holds until its wait."""


@dataclass(frozen=True)
class Event:
    """One instruction on the time axis, seconds; a receive lasts until its message has come."""

    rank: int
    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated (or measured) step."""

    events: tuple[Event, ...]
    makespan: float
    busy: tuple[float, ...]
    """Seconds of compute per rank."""
    receiving: tuple[float, ...]
    """Seconds of transfer per rank that nothing hides: it waits while a message is on its way."""
    reducing: tuple[float, ...]
    """Seconds per rank in which its flush waits for sums over the replicas."""

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the makespan that each rank waits."""
        return tuple(1 - busy / self.makespan for busy in self.busy)

    @property
    def idle_fraction(self) -> float:
        """Mean of `idle` over the ranks."""
        return sum(self.idle) / len(self.idle)


def timeline_of(events: Sequence[Event], num_ranks: int) -> Timeline:
    """A measured step from its events; what they spend in `wait` counts as receiving."""
    busy, receiving, reducing = ([0.0] * num_ranks for _ in range(3))
    for event in events:
        kind, seconds = event.instruction.kind, event.end - event.start
        if kind in COMPUTE_KINDS:
            busy[event.rank] += seconds
        elif kind == "wait":
            receiving[event.rank] += seconds
        elif kind == "flush":
            reducing[event.rank] += seconds
    end = max((event.end for event in events), default=0.0)
    return Timeline(tuple(events), end, tuple(busy), tuple(receiving), tuple(reducing))


class Deadlock(ValueError):
    """Every unfinished rank waits for a message that nobody has sent."""


class _Simulation:
    """Ranks, messages and sums on one time axis, looked at in the order in which things happen."""

    def __init__(self, schedule: Schedule, times: Durations) -> None:
        self.schedule, self.times = schedule, times
        ranks = len(schedule.ranks)
        self.events: list[Event] = []
        self.end = 0.0
        self.busy, self.receiving, self.reducing = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
        self.position = [0] * ranks
        self._sums = last_gradients(schedule.style)
        self._reduced = [0.0] * ranks
        self._done: set[Instruction] = set()
        self._armed: dict[Instruction, Instruction] = {}
        self._ready: Counter[Message] = Counter()
        self._transfers: dict[Message, tuple[float, float]] = {}
        self._lanes: dict[object, float] = {}
        self._waiting: dict[Message, tuple[int, float]] = {}
        # (time, order of request, rank that goes on)
        self._agenda = [(0.0, rank, rank) for rank in range(ranks)]
        self._requests = count(ranks)

    def run(self) -> None:
        while self._agenda:
            now, _, rank = heapq.heappop(self._agenda)
            self._go_on(rank, now)

    def _go_on(self, rank: int, now: float) -> None:
        """Carry a rank on from this moment to the next one at which time passes for it."""
        steps = self.schedule.ranks[rank]
        while self.position[rank] < len(steps):
            step, since, end = steps[self.position[rank]], now, now
            if step.kind == "wait":
                if step.message not in self._transfers:
                    self._waiting[step.message] = rank, now
                    return
                since, end = self._wait(rank, step, now)
            elif step.kind in ("send", "receive"):
                self._meet(step, now)
            elif step.kind in self._sums:
                self._reduce(rank, step, now)
            elif step.kind == "flush":
                end = max(now, self._reduced[rank])
                self.reducing[rank] = end - now
            else:
                end = self._compute(rank, step, now)
            self.events.append(Event(rank, step, since, end))
            self.position[rank] += 1
            self.end = max(self.end, end)
            if end > now:
                heapq.heappush(self._agenda, (end, next(self._requests), rank))
                return

    def _compute(self, rank: int, step: Instruction, now: float) -> float:
        seconds = self.times.of(step)
        self.busy[rank] += seconds
        self._done.add(step)
        if step in self._armed:
            # Its gradients appear piece by piece, and so begin their sums.
            reduction = self._armed[step]
            pieces = self.times.pieces.get((reduction.kind, step.stage), 1)
            for piece in range(1, pieces + 1):
                made = now + seconds * piece / pieces
                each = self.times.of(reduction) / pieces
                self._reduced[rank] = max(self._reduced[rank], made) + each
        return now + seconds

    def _reduce(self, rank: int, step: Instruction, now: float) -> None:
        completing = replace(step, kind=self._sums[step.kind])
        if completing in self._done:
            self._reduced[rank] = max(self._reduced[rank], now) + self.times.of(step)
        else:
            self._armed[completing] = step

    def _meet(self, step: Instruction, now: float) -> None:
        """The second of send and receive begins the transfer, when its lanes are free."""
        message = step.message
        self._ready[message] += 1
        if self._ready[message] < 2:
            return
        lanes = [message[:3], *self.times.lanes.get((message[0], message[1]), ())]
        begun = max([now, *(self._lanes.get(lane, 0.0) for lane in lanes)])
        seconds = self.times.transfer.get((message[0], message[1]), 0.0)
        self._transfers[message] = begun, begun + seconds
        self._lanes |= dict.fromkeys(lanes, begun + seconds)
        if message in self._waiting:
            rank, _ = self._waiting[message]
            heapq.heappush(self._agenda, (now, next(self._requests), rank))

    def _wait(self, rank: int, step: Instruction, now: float) -> tuple[float, float]:
        """When the rank came to the wait, and when it goes on."""
        begun, arrived = self._transfers[step.message]
        _, since = self._waiting.pop(step.message, (rank, now))
        self.receiving[rank] += max(0.0, arrived - max(since, begun))
        return since, max(now, arrived)


def simulate(schedule: Schedule, times: Durations) -> Timeline:
    """Run the lists: each rank in order, only `wait` and `flush` wait.

    A transfer starts when the message is sent, its receive is posted, the one before it on the
    channel has come and no other message uses its lanes (a network card's way in or out): NCCL
    takes a receive up behind the computations queued before it. A rank's sums over its replicas
    follow one another, beside computations and messages. Raises Deadlock with the instruction that
    each rank hangs at.
    """
    simulation = _Simulation(schedule, times)
    simulation.run()
    # Whoever is not at the end waits for a message that nobody will send.
    stuck = {
        rank: steps[simulation.position[rank]]
        for rank, steps in enumerate(schedule.ranks)
        if simulation.position[rank] < len(steps)
    }
    if stuck:
        hangs = "; ".join(f"rank {rank} at {instruction}" for rank, instruction in stuck.items())
        raise Deadlock(f"schedule {schedule.name} never ends: {hangs}")
    return Timeline(
        tuple(simulation.events),
        simulation.end,
        tuple(simulation.busy),
        tuple(simulation.receiving),
        tuple(simulation.reducing),
    )


def peak_activation_bytes(schedule: Schedule, memory: Sequence[Memory]) -> tuple[int, ...]:
    """Largest sum of saved activations on each rank; depends on the order only, not on times."""
    last = "weight_gradient" if schedule.style.split_backward else "backward"
    released = {"encoder": f"encoder_{last}", "decoders": f"decoder_{last}"}
    peaks = []
    for instructions in schedule.ranks:
        current = peak = 0
        for instruction in instructions:
            stage = memory[instruction.stage]
            if instruction.kind == "receive" and instruction.payload is not None:
                current += stage.messages.get(instruction.payload, 0)
            elif instruction.kind == "wait" and instruction.payload is not None:
                # From here on it is the input of a computation, which counts it.
                current -= stage.messages.get(instruction.payload, 0)
            elif instruction.kind == "forward":
                current += stage.encoder
            elif instruction.kind == "decoder_forward" or (
                instruction.kind == "decoder" and schedule.style.split_backward
            ):
                current += stage.decoders
            elif instruction.kind == "decoder":
                # Decoders run one after the other, forward and backward: one is alive at a time.
                peak = max(peak, current + stage.largest_decoder)
            # The peak is taken before the release: a backward still holds what it reads.
            peak = max(peak, current)
            if instruction.kind == released["encoder"]:
                current -= stage.encoder
            elif instruction.kind == released["decoders"]:
                current -= stage.decoders
        peaks.append(peak)
    return tuple(peaks)
