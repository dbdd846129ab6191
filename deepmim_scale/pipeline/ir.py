"""Schedules as data: one list of instructions per rank, simulated, drawn, checked and executed.

Stages are numbered globally from 0 in the order of the encoder's blocks. `linear` placement puts
stage r on rank r; `v` puts stages r and 2P - 1 - r on rank r of P, which makes both stages of a
MIRL pair local.

Compute instructions (of a stage and a micro-batch) and what each may rely on:

| kind                      | does                                      | after                    |
|---------------------------|-------------------------------------------|--------------------------|
| `forward`                 | encoder slice (MIRL: also its carries)    | forward above            |
| `decoder`                 | decoders one by one, each forward and     | forward                  |
|                           | backward on the detached tap              |                          |
| `decoder_forward`         | decoders' forward on the detached taps    | forward                  |
| `decoder_backward`        | their losses and backward                 | decoder_forward (pairs)  |
| `encoder_backward`        | backward through the encoder slice        | decoder(_backward),      |
|                           |                                           | encoder_backward below   |
| `decoder_weight_gradient` | queued weight gradients of the decoders   | decoder(_backward)       |
| `encoder_weight_gradient` | queued weight gradients of the encoder    | encoder_backward         |
| `reduce_decoders`         | sums the decoders' gradients over the     | what its place says, see |
|                           | replicas, beside what follows             | "Reductions"             |
| `reduce_encoder`          | the same for the encoder slice            | likewise                 |
| `flush`                   | last of a rank: waits for what was sent   | everything               |
|                           | and reduced; then vote and optimizer      |                          |

"Above" is stage - 1, "below" is stage + 1. A stage without a decoder has no decoder instructions.
The weight-gradient kinds appear only with `Style.split_backward`: then the backward of Linear
layers leaves their weight gradients queued, and nothing else changes. With `Style.colocated`
"forward above" means all of it, decoders included, and the decoders' backward too waits for the
gradient from below.

MIRL pairs stage s with stage S - 1 - s of S. The deeper one's `decoder_backward` evaluates the pair
losses, so it needs the partner's `decoder_forward` (payload `prediction`), and makes the gradient
that the shallower one's `decoder_backward` needs (payload `prediction_gradient`). A stage that is
its own partner holds both halves.

Messages: `send` never waits (isend; keep the tensor alive until it is done), `receive` posts room
for the message and does not wait either, `wait` waits until it has come. `peer` is the *stage* at
the other end; `Pipeline.rank_of(peer)` is its rank. A message is known by (payload, stage, peer,
micro-batch), there are exactly one `receive` and one `wait` for it, and the messages of one
(payload, source, target) travel in micro-batch order at both ends, so no tags are needed where each
payload and direction has a channel of its own. A transfer begins when the message is sent and its
receive is posted, and lies beside whatever the receiver computes until its `wait`.
Stages on the same rank exchange no messages: the executor hands the tensor over.

Reductions: `reduce_*` of micro-batch m covers the gradients of all micro-batches up to m that were
not yet covered. After the instruction that completes these gradients the sum begins at once; before
it, piece by piece (a few blocks, a decoder) while that instruction runs. A list without reductions
sums everything at the end of the step. They belong to a run (`--reduction`), not to an order:
`passes.insert_reductions` adds them.

Order: for each stage and kind the micro-batches come as 0, 1, ..., M - 1. Every parameter's
gradient is thus accumulated in the same order whatever the schedule, which makes sums bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from deepmim_scale.methods.base import Placement

Kind = Literal[
    "forward",
    "decoder",
    "decoder_forward",
    "decoder_backward",
    "encoder_backward",
    "decoder_weight_gradient",
    "encoder_weight_gradient",
    "reduce_decoders",
    "reduce_encoder",
    "send",
    "receive",
    "wait",
    "flush",
]
Reduction = Literal["overlapped", "coalesced", "per_microbatch"]
"""When a stage's gradients are summed over its replicas; see `passes.insert_reductions`."""
Payload = Literal["activation", "gradient", "prediction", "prediction_gradient"]

COMPUTE_KINDS: tuple[Kind, ...] = (
    "forward",
    "decoder",
    "decoder_forward",
    "decoder_backward",
    "encoder_backward",
    "decoder_weight_gradient",
    "encoder_weight_gradient",
)
"""What keeps a rank busy."""

Message = tuple[Payload | None, int | None, int | None, int]
"""(payload, source stage, target stage, micro-batch)."""


@dataclass(frozen=True)
class Instruction:
    """One step of a rank; `payload` and `peer` (a stage) are set for messages only."""

    kind: Kind
    stage: int
    microbatch: int
    """-1 for flush."""
    payload: Payload | None = None
    peer: int | None = None

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.kind, self.payload)))
        peer = "" if self.peer is None else f" (peer: stage {self.peer})"
        return f"{what} of stage {self.stage}, micro-batch {self.microbatch}{peer}"

    @property
    def message(self) -> Message:
        """What identifies a message, the same at both ends."""
        ends = (self.stage, self.peer) if self.kind == "send" else (self.peer, self.stage)
        return (self.payload, *ends, self.microbatch)


@dataclass(frozen=True)
class Pipeline:
    """Where stages are and which of them have decoders."""

    num_ranks: int
    decoders: tuple[bool, ...]
    """For each stage: has it a decoder?"""
    placement: Placement = "linear"
    paired: bool = False
    """MIRL: the losses join stage s and stage S - 1 - s."""
    local_gradients: bool = False
    """gradient_flow=local: no gradient crosses a boundary (another algorithm)."""

    def __post_init__(self) -> None:
        stages = self.num_ranks * (2 if self.placement == "v" else 1)
        assert len(self.decoders) == stages, f"{len(self.decoders)} stages on {self}"

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.decoders)

    def rank_of(self, stage: int) -> int:
        """Rank that holds a stage."""
        # The second half of the stages comes back over the same ranks.
        if self.placement == "v" and stage >= self.num_ranks:
            return self.num_stages - 1 - stage
        return stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages of a rank, shallow first."""
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def partner(self, stage: int) -> int:
        """The other stage of a pair."""
        return self.num_stages - 1 - stage

    def is_shallow(self, stage: int) -> bool:
        """Whether a deeper stage evaluates the losses of this one's predictions."""
        return self.paired and stage < self.partner(stage)


@dataclass(frozen=True)
class Style:
    """How a stage's work is cut into instructions."""

    fused_decoders: bool = False
    """Each decoder runs forward and backward at once (`decoder`)."""
    colocated: bool = False
    """As a framework does that sees the stage as one module: the activation leaves after the
    decoders' forward, and their backward waits for the gradient from below."""
    split_backward: bool = False
    """Weight gradients are instructions of their own."""


@dataclass(frozen=True)
class Schedule:
    """The instruction lists of one optimizer step."""

    name: str
    pipeline: Pipeline
    num_microbatches: int
    style: Style
    ranks: tuple[tuple[Instruction, ...], ...]


def last_gradients(style: Style) -> dict[Kind, Kind]:
    """For each reduction the compute kind after which a micro-batch's gradients are whole."""
    if style.split_backward:
        return {
            "reduce_decoders": "decoder_weight_gradient",
            "reduce_encoder": "encoder_weight_gradient",
        }
    decoder: Kind = "decoder" if style.fused_decoders else "decoder_backward"
    return {"reduce_decoders": decoder, "reduce_encoder": "encoder_backward"}


def stage_kinds(pipeline: Pipeline, stage: int, style: Style) -> tuple[Kind, ...]:
    """Compute kinds that every micro-batch passes on a stage."""
    kinds: list[Kind] = ["forward"]
    if pipeline.decoders[stage]:
        kinds += ["decoder"] if style.fused_decoders else ["decoder_forward", "decoder_backward"]
        kinds += ["decoder_weight_gradient"] if style.split_backward else []
    kinds += ["encoder_backward"]
    kinds += ["encoder_weight_gradient"] if style.split_backward else []
    return tuple(kinds)


def dependencies(
    pipeline: Pipeline, step: Instruction, style: Style
) -> Iterator[tuple[Instruction, Payload | None]]:
    """What a step relies on, each with the payload that it takes from there (None: no tensor)."""
    stage, microbatch = step.stage, step.microbatch
    has_decoder = pipeline.decoders[stage]
    below = stage + 1 < pipeline.num_stages and not pipeline.local_gradients
    first_backward = "decoder_backward" if style.colocated and has_decoder else "encoder_backward"

    def at(kind: Kind, stage: int = stage) -> Instruction:
        return Instruction(kind, stage, microbatch)

    loss: Kind = "decoder" if style.fused_decoders else "decoder_backward"
    if step.kind == "forward":
        # As one module a stage hands on nothing before its decoders have run.
        if stage > 0:
            leaves = style.colocated and pipeline.decoders[stage - 1]
            yield at("decoder_forward" if leaves else "forward", stage - 1), "activation"
    elif step.kind in ("decoder", "decoder_forward"):
        yield at("forward"), None
    elif step.kind == "decoder_backward":
        yield at("decoder_forward"), None
        # The deeper stage of a pair evaluates the loss, and sends the shallower one its gradient.
        partner = pipeline.partner(stage)
        if pipeline.paired and partner < stage:
            yield at("decoder_forward", partner), "prediction"
        elif pipeline.paired and partner > stage:
            yield at("decoder_backward", partner), "prediction_gradient"
    elif step.kind == "encoder_backward":
        yield at(loss if has_decoder else "forward"), None
    elif step.kind == "decoder_weight_gradient":
        yield at(loss), None
    elif step.kind == "encoder_weight_gradient":
        yield at("encoder_backward"), None
    # The first backward of a stage waits for the stage below; with co-located decoders in the
    # encoder's graph that is theirs.
    if step.kind == first_backward and below:
        yield at("encoder_backward", stage + 1), "gradient"


def insert_messages(
    name: str,
    pipeline: Pipeline,
    num_microbatches: int,
    orders: Sequence[Sequence[Instruction]],
    style: Style,
) -> Schedule:
    """Put receives and waits before, and sends after, a rank's steps, and a flush at the end."""
    # Both ends of a message come from one look at the dependencies, so they always match.
    incoming: dict[Instruction, list[Instruction]] = {}
    outgoing: dict[Instruction, list[Instruction]] = {}
    for step in (step for order in orders for step in order):
        for source, payload in dependencies(pipeline, step, style):
            if pipeline.rank_of(source.stage) == pipeline.rank_of(step.stage):
                continue
            assert payload is not None, f"{step} needs {source} of another rank without a message"
            ends = (step.stage, step.microbatch, payload, source.stage)
            send = Instruction("send", source.stage, step.microbatch, payload, step.stage)
            incoming.setdefault(step, []).append(Instruction("receive", *ends))
            incoming[step].append(Instruction("wait", *ends))
            outgoing.setdefault(source, []).append(send)

    ranks = []
    for rank, order in enumerate(orders):
        instructions: list[Instruction] = []
        for step in order:
            # A tensor leaves as soon as it is made and is awaited as late as possible.
            instructions += [*incoming.get(step, []), step, *outgoing.get(step, [])]
        flush = Instruction("flush", pipeline.stages_of(rank)[0], -1)
        ranks.append((*instructions, flush))
    return Schedule(name, pipeline, num_microbatches, style, tuple(ranks))


@dataclass(frozen=True)
class Durations:
    """Durations in seconds, predicted or profiled, of one schedule's instructions."""

    compute: Mapping[tuple[Kind, int], float]
    """By kind and stage; a reduction's are those that its sum takes beside the computations."""
    transfer: Mapping[tuple[Payload | None, int | None], float]
    """By payload and source stage, once both ends are there; missing ones take no time."""
    lanes: Mapping[tuple[Payload | None, int | None], tuple[str, ...]] = field(default_factory=dict)
    """What a transfer shares with others, one at a time: cards of nodes, by payload and source."""
    pieces: Mapping[tuple[Kind, int], int] = field(default_factory=dict)
    """Into how many equal sums a reduction falls, by kind and stage."""

    def lane_seconds(self) -> dict[str, float]:
        """What each lane carries of one micro-batch."""
        found: dict[str, float] = {}
        for message, lanes in self.lanes.items():
            for lane in lanes:
                found[lane] = found.get(lane, 0.0) + self.transfer.get(message, 0.0)
        return found

    def of(self, step: Instruction) -> float:
        """Seconds of a computation or a reduction, and of the transfer that a wait is for."""
        if step.kind == "wait":
            return self.transfer.get((step.payload, step.peer), 0.0)
        return self.compute.get((step.kind, step.stage), 0.0)
