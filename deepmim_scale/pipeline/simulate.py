"""Discrete-event simulation of instruction lists: makespan, idle share, activation bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepmim_scale.pipeline.ir import Durations, Instruction, Message, Schedule


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
    """Seconds of transfer per rank, in which it only receives."""

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the makespan that each rank waits."""
        return tuple(1 - busy / self.makespan for busy in self.busy)

    @property
    def idle_fraction(self) -> float:
        """Mean of `idle` over the ranks."""
        return sum(self.idle) / len(self.idle)


class Deadlock(ValueError):
    """Every unfinished rank waits for a message that nobody has sent."""


def simulate(schedule: Schedule, times: Durations) -> Timeline:
    """Run the lists: each rank in order, sends without waiting, receives until the message comes.

    A transfer starts when the message is sent and the receiver is there: NCCL takes a receive up
    behind the computations queued before it, so that it overlaps none of them. Raises Deadlock with
    the instruction that each rank hangs at.
    """
    clock = [0.0] * len(schedule.ranks)
    busy = [0.0] * len(schedule.ranks)
    receiving = [0.0] * len(schedule.ranks)
    position = [0] * len(schedule.ranks)
    sent: dict[Message, float] = {}
    events: list[Event] = []
    # Every rank runs as far as it can; a round in which none moved is the end, or a deadlock.
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(schedule.ranks):
            while position[rank] < len(instructions):
                instruction = instructions[position[rank]]
                start = end = clock[rank]
                if instruction.kind == "receive":
                    if instruction.message not in sent:
                        break  # look again when its sender has come further
                    end = max(start, sent[instruction.message]) + times.of(instruction)
                    receiving[rank] += times.of(instruction)
                elif instruction.kind == "send":
                    # isend: the rank goes on at once, the transfer counts at the receiver.
                    sent[instruction.message] = start
                else:
                    end = start + times.of(instruction)
                    busy[rank] += end - start
                events.append(Event(rank, instruction, start, end))
                clock[rank] = end
                position[rank] += 1
                moved = True
    # Whoever is not at the end waits for a message that nobody will send.
    stuck = {
        rank: instructions[position[rank]]
        for rank, instructions in enumerate(schedule.ranks)
        if position[rank] < len(instructions)
    }
    if stuck:
        hangs = "; ".join(f"rank {rank} at {instruction}" for rank, instruction in stuck.items())
        raise Deadlock(f"schedule {schedule.name} never ends: {hangs}")
    return Timeline(tuple(events), max(clock), tuple(busy), tuple(receiving))


def peak_activation_bytes(schedule: Schedule, memory: Sequence[Memory]) -> tuple[int, ...]:
    """Largest sum of saved activations on each rank; depends on the order only, not on times."""
    last = "weight_gradient" if schedule.style.split_backward else "backward"
    released = {"encoder": f"encoder_{last}", "decoders": f"decoder_{last}"}
    peaks = []
    for instructions in schedule.ranks:
        current = peak = 0
        for instruction in instructions:
            stage = memory[instruction.stage]
            if instruction.kind == "forward":
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
