"""Runs one rank's list of instructions (plan/schedule.py) over real stages and messages.

What an instruction computes for other instructions lies in `mail`, keyed by message: `send` posts
it, `receive` fills it, and stages of the same rank find it there without either.
Legend: M micro-batches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepmim_scale.batch import Batch, masking_from_noise
from deepmim_scale.config import ModelConfig
from deepmim_scale.ds_config import Precision
from deepmim_scale.images import normalize
from deepmim_scale.models.stage import (
    Criterion,
    State,
    decoder_names,
    loss_members,
    loss_weight,
)
from deepmim_scale.models.taps import Leaf, detach_tap, gradient_root
from deepmim_scale.models.weight_queue import WeightQueue, defer_weight_gradients
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.clock import Clock
from deepmim_scale.parallel.p2p import Channels
from deepmim_scale.parallel.stages import RankStages, message_specs
from deepmim_scale.pipeline.ir import Instruction, Kind, Message, Payload, Schedule
from deepmim_scale.plan.partition import Layout

EVALUATION_KINDS = frozenset({"forward", "decoder", "decoder_forward", "decoder_backward", "flush"})
EVALUATION_PAYLOADS = frozenset({"activation", "prediction"})


@dataclass
class _Work:
    """What a stage keeps of a micro-batch between its instructions."""

    inputs: State = ()
    outputs: State = ()
    leaves: dict[str, list[Leaf]] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    decoder_queue: WeightQueue = field(default_factory=WeightQueue)
    encoder_queue: WeightQueue = field(default_factory=WeightQueue)


class Executor:
    """One rank of a pipeline."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: RankStages,
        channels: Channels,
        config: ModelConfig,
        layout: Layout,
        *,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.schedule, self.rank, self.stages, self.channels = schedule, rank, stages, channels
        self.config, self.layout, self.precision, self.device = config, layout, precision, device
        self._clock = Clock(device)
        self._marks: list[tuple[Instruction, Any, Any]] = []
        self.teacher: Callable[[Tensor, Tensor], Tensor] | None = None
        """Targets from (images normalized, noise) where they are not raw pixels, see `targets`."""
        self._current = schedule.ranks[rank][-1]
        names = decoder_names(config)
        self._names = [[names[config.taps[k]] for k in stage.decoders] for stage in layout]
        for number in schedule.pipeline.stages_of(rank):
            stages[number].gradient_hint = loss_weight(config) / schedule.num_microbatches
        self._run: dict[Kind, Callable[[Instruction], None]] = {
            "forward": self._forward,
            "decoder": self._decoder,
            "decoder_forward": self._decoder_forward,
            "decoder_backward": self._decoder_backward,
            "encoder_backward": self._encoder_backward,
            "decoder_weight_gradient": self._decoder_weight_gradient,
            "encoder_weight_gradient": self._encoder_weight_gradient,
            "send": self._send,
            "receive": self._receive,
            "flush": lambda step: self.channels.finish(),
        }

    @property
    def num_backward_calls(self) -> int:
        """How often one step calls `backward`."""
        return sum(self._calls(step) for step in self.schedule.ranks[self.rank])

    def _calls(self, step: Instruction) -> int:
        if step.kind == "encoder_backward":
            return 1
        if step.kind == "decoder":
            return len(self._names[step.stage])
        if step.kind == "decoder_backward":
            return 1 if self._is_shallow(step.stage) else len(self._losses_of(step.stage))
        return 0

    def _is_shallow(self, stage: int) -> bool:
        """Whether a deeper stage evaluates the losses of this one's predictions."""
        pipeline = self.schedule.pipeline
        return pipeline.paired and stage < pipeline.partner(stage)

    def _losses_of(self, stage: int) -> dict[str, tuple[str, ...]]:
        """The losses that a stage evaluates: those whose deepest decoder it holds."""
        members = loss_members(self.config)
        return {name: m for name, m in members.items() if m[-1] in self._names[stage]}

    def train(
        self, batches: Sequence[Batch], backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """One step over M micro-batches; returns this rank's losses, summed over them.

        `backward` is called with scalars, num_backward_calls times.
        """
        return self._execute(self.schedule.ranks[self.rank], batches, backward)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """This rank's losses of one batch, without gradients; every rank must call it."""
        steps = [
            step
            for step in self.schedule.ranks[self.rank]
            if step.microbatch <= 0
            and (step.kind in EVALUATION_KINDS or step.payload in EVALUATION_PAYLOADS)
        ]
        return self._execute(steps, [batch], None)

    def _execute(
        self,
        steps: Sequence[Instruction],
        batches: Sequence[Batch],
        backward: Callable[[Tensor], None] | None,
    ) -> dict[str, Tensor]:
        self._backward = backward
        self._losses: dict[str, Tensor] = {}
        self._mail: dict[Message, tuple[Tensor, ...]] = {}
        self._work: dict[tuple[int, int], _Work] = {}
        self._batches = list(batches)
        self._masks = [masking_from_noise(b.noise, self.config.num_visible) for b in batches]
        self._criteria: dict[int, Criterion] = {}
        self._marks = []
        # Entered once, so that the 16-bit copies of the weights serve all micro-batches.
        with zero.autocast(self.precision, self.device):
            for step in steps:
                self._current = step
                began = self._clock.mark()
                self._run[step.kind](step)
                self._marks.append((step, began, self._clock.mark()))
        return self._losses

    @property
    def where(self) -> str:
        """Stage, micro-batch and instruction that were begun last; "flush" until the next step."""
        step = self._current
        # A flush comes after the last micro-batch.
        m = step.microbatch if step.microbatch >= 0 else self.schedule.num_microbatches - 1
        what = f"{step.kind} {step.payload or ''}".strip()
        peer = "" if step.peer is None else f" (peer: stage {step.peer})"
        return f"stage {step.stage}, micro-batch {m}, instruction {what}{peer}"

    def seconds(self) -> dict[tuple[Kind, int], float]:
        """What the last step's computations took on average, s, by kind and stage."""
        found: dict[tuple[Kind, int], list[float]] = {}
        for step, start, end in self._marks:
            if step.payload is None and step.kind != "flush":
                seconds = self._clock.seconds(start, end)
                found.setdefault((step.kind, step.stage), []).append(seconds)
        return {key: sum(values) / len(values) for key, values in found.items()}

    def busy_and_step_seconds(self) -> tuple[float, float]:
        """Seconds of the last step in which this rank computed, and seconds of the whole step."""
        count = self.schedule.num_microbatches
        busy = sum(count * seconds for seconds in self.seconds().values())
        return busy, self._clock.seconds(self._marks[0][1], self._marks[-1][2])

    def _at(self, step: Instruction) -> _Work:
        return self._work.setdefault((step.stage, step.microbatch), _Work())

    def _queue(self, queue: WeightQueue) -> Any:
        return defer_weight_gradients(queue if self.schedule.style.split else None)

    def _post(self, payload: Payload, step: Instruction, target: int, tensors: State) -> None:
        self._mail[payload, step.stage, target, step.microbatch] = tensors

    def _take(self, payload: Payload, source: int, step: Instruction) -> State:
        return self._mail.pop((payload, source, step.stage, step.microbatch))

    def _forward(self, step: Instruction) -> None:
        stage, work, mask = self.stages[step.stage], self._at(step), self._masks[step.microbatch]
        with self._queue(work.encoder_queue):
            if step.stage == 0:
                state = stage.embed(self._batches[step.microbatch].images, mask)
            else:
                sent = self._take("activation", step.stage - 1, step)
                training = torch.is_grad_enabled()
                state = work.inputs = tuple(t.detach().requires_grad_(training) for t in sent)

            def tap(name: str, tensors: State) -> State:
                onward, leaves = zip(*map(detach_tap, tensors), strict=True)
                work.leaves[name] = list(leaves)
                return onward

            work.outputs = stage.encode(state, tap)
        if step.stage + 1 < self.schedule.pipeline.num_stages:
            sent = tuple(tensor.detach() for tensor in work.outputs)
            self._post("activation", step, step.stage + 1, sent)

    def _predict(self, step: Instruction, name: str) -> Tensor:
        work = self._at(step)
        tensors = tuple(leaf.tensor for leaf in work.leaves[name])
        return self.stages[step.stage].decode(name, tensors, self._masks[step.microbatch])

    def _criterion(self, step: Instruction) -> Criterion:
        m = step.microbatch
        if m not in self._criteria:
            batch = self._batches[m]
            # Here and not before the step: it fills bubbles, and few micro-batches hold features.
            teacher = self.teacher and self.teacher(normalize(batch.images), batch.noise)
            stage = self.stages[step.stage]
            self._criteria[m] = stage.criterion(batch.images, self._masks[m], teacher)
        return self._criteria[m]

    def _add_loss(self, name: str, loss: Tensor) -> None:
        # In double precision, so that a step's loss has the same bits however many replicas share
        # its micro-batches.
        before = self._losses.get(name, 0.0)
        self._losses[name] = before + loss.detach().double()
        if self._backward is not None:
            self._backward(loss * loss_weight(self.config))

    def _decoder(self, step: Instruction) -> None:
        with self._queue(self._at(step).decoder_queue):
            for name in self._names[step.stage]:
                self._add_loss(name, self._criterion(step)(name, [self._predict(step, name)]))

    def _decoder_forward(self, step: Instruction) -> None:
        work, pipeline = self._at(step), self.schedule.pipeline
        if pipeline.paired and pipeline.partner(step.stage) == step.stage:
            return  # both halves are here: each pair runs forward and backward at once
        with self._queue(work.decoder_queue):
            for name in self._names[step.stage]:
                work.predictions[name] = self._predict(step, name)
        if self._is_shallow(step.stage):
            sent = tuple(prediction.detach() for prediction in work.predictions.values())
            self._post("prediction", step, pipeline.partner(step.stage), sent)

    def _decoder_backward(self, step: Instruction) -> None:
        work, partner = self._at(step), self.schedule.pipeline.partner(step.stage)
        if self._is_shallow(step.stage):
            if self._backward is not None:
                gradients = self._take("prediction_gradient", partner, step)
                self._backward(gradient_root(tuple(work.predictions.values()), gradients))
            work.predictions = {}
            return
        partners: dict[str, Tensor] = {}
        if self.schedule.pipeline.paired and partner < step.stage:
            sent = self._take("prediction", partner, step)
            training = torch.is_grad_enabled()
            partners = {
                name: prediction.detach().requires_grad_(training)
                for name, prediction in zip(self._names[partner], sent, strict=True)
            }
        with self._queue(work.decoder_queue):
            for name, members in self._losses_of(step.stage).items():
                ready = partners | work.predictions
                predictions = [ready[m] if m in ready else self._predict(step, m) for m in members]
                for member in members:
                    work.predictions.pop(member, None)
                self._add_loss(name, self._criterion(step)(name, predictions))
        if partners and self._backward is not None:
            gradients = tuple(_gradient(partners[name]) for name in self._names[partner])
            self._post("prediction_gradient", step, partner, gradients)

    def _encoder_backward(self, step: Instruction) -> None:
        work, pipeline = self._at(step), self.schedule.pipeline
        gradients: tuple[Tensor | None, ...] = (None,) * len(work.outputs)
        if step.stage + 1 < pipeline.num_stages and not pipeline.local_gradients:
            gradients = self._take("gradient", step.stage + 1, step)
        assert self._backward is not None, "evaluation has no backward"
        with self._queue(work.encoder_queue):
            self._backward(gradient_root(work.outputs, gradients))
        if step.stage > 0 and not pipeline.local_gradients:
            sent = tuple(_gradient(tensor) for tensor in work.inputs)
            self._post("gradient", step, step.stage - 1, sent)
        work.inputs = work.outputs = ()
        work.leaves = {}
        self._criteria.pop(step.microbatch, None)

    def _decoder_weight_gradient(self, step: Instruction) -> None:
        self._at(step).decoder_queue.run()

    def _encoder_weight_gradient(self, step: Instruction) -> None:
        self._at(step).encoder_queue.run()

    def _send(self, step: Instruction) -> None:
        self.channels.send(step, self._mail.pop(step.message))

    def _receive(self, step: Instruction) -> None:
        payload, source, target, m = step.message
        assert payload is not None, f"{step} carries nothing"
        assert source is not None, f"{step} comes from nowhere"
        assert target is not None, f"{step} goes nowhere"
        specs = message_specs(
            self.config,
            self.layout,
            payload,
            source,
            target,
            batch=len(self._batches[m].images),
            precision=self.precision,
        )
        self._mail[step.message] = self.channels.receive(step, specs)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "nothing downstream used a tensor that crossed a boundary"
    return tensor.grad
