"""What each instruction does: one step of one rank, from its micro-batches to its losses.

What an instruction computes for other instructions lies in `mail`, keyed by message: `send` posts
it, `wait` fills it, and stages of the same rank find it there without either.
Legend: B images, L patches, K visible patches, M micro-batches of a step, P prediction width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepmim_scale.batch import Batch, masking_from_noise
from deepmim_scale.methods import Loss, decoder_names, losses_of
from deepmim_scale.models.stage import State
from deepmim_scale.models.taps import Leaf, detach_tap, gradient_root
from deepmim_scale.models.weight_queue import WeightQueue, defer_weight_gradients
from deepmim_scale.objectives import Objective
from deepmim_scale.parallel.gradients import GradientReducer
from deepmim_scale.parallel.p2p import Channels
from deepmim_scale.parallel.stages import RankStages, TensorRoom, part_of_stage
from deepmim_scale.parallel.weights import WeightGatherer
from deepmim_scale.pipeline.ir import (
    COMPUTE_KINDS,
    Instruction,
    Kind,
    Message,
    Payload,
    Schedule,
    last_gradients,
)
from deepmim_scale.plan.messages import message_tensors
from deepmim_scale.plan.partition import Layout
from deepmim_scale.precision import Precision

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class RankParts:
    """What a rank has for every step."""

    layout: Layout
    pp_rank: int
    stages: RankStages
    channels: Channels
    objective: Objective
    precision: Precision
    reducer: GradientReducer | None = None
    """Sums gradients over the replicas, where a schedule tells it to."""
    weights: WeightGatherer | None = None
    """Has the last step's weights, or they are still on their way."""

    def decoders_of(self, stage: int) -> list[str]:
        """Names of a stage's decoders, shallow first."""
        names = decoder_names(self.stages.config)
        return [names[self.stages.config.taps[k]] for k in self.layout[stage].decoders]

    def losses_of(self, stage: int) -> dict[str, Loss]:
        """The losses that a stage evaluates: those whose deepest decoder it holds."""
        own = self.decoders_of(stage)
        losses = losses_of(self.stages.config)
        return {name: loss for name, loss in losses.items() if loss.decoders[-1] in own}


@dataclass
class _Work:
    """What a stage keeps of a micro-batch between its instructions."""

    inputs: State = ()
    outputs: State = ()
    leaves: dict[str, list[Leaf]] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    decoder_queue: WeightQueue = field(default_factory=WeightQueue)
    encoder_queue: WeightQueue = field(default_factory=WeightQueue)


def expected_grad_scale(weight: float, num_microbatches: int) -> float:
    """The gradient of a loss as backward will bring it: 1 / M times its weight, rounded as there.

    Backward divides by M first, then multiplies by the weight, both in fp32. A kernel that is told
    another number stores gradients that it must correct in one more pass.
    """
    return float(np.float32(1.0) / np.float32(num_microbatches) * np.float32(weight))


class Step:
    """One run through an instruction list; thrown away afterwards."""

    def __init__(
        self,
        parts: RankParts,
        schedule: Schedule,
        batches: Sequence[Batch],
        backward: Backward | None,
    ) -> None:
        self.losses: dict[str, Tensor] = {}
        """This rank's losses, summed over the micro-batches."""
        self._parts, self._schedule, self._pipeline = parts, schedule, schedule.pipeline
        self._batches, self._backward = batches, backward
        num_visible = parts.stages.config.num_visible
        self._masks = [masking_from_noise(batch.noise, num_visible) for batch in batches]
        self._targets: dict[int, Any] = {}
        self._mail: dict[Message, tuple[Tensor, ...]] = {}
        self._work: dict[tuple[int, int], _Work] = {}
        self._executed: set[Instruction] = set()
        self._do: dict[Kind, Callable[[Instruction], None]] = {
            "forward": self._forward,
            "decoder": self._decoder,
            "decoder_forward": self._decoder_forward,
            "decoder_backward": self._decoder_backward,
            "encoder_backward": self._encoder_backward,
            "decoder_weight_gradient": lambda step: self._at(step).decoder_queue.run(),
            "encoder_weight_gradient": lambda step: self._at(step).encoder_queue.run(),
            "send": self._send,
            "receive": self._receive,
            "wait": self._wait,
            "reduce_decoders": self._reduce,
            "reduce_encoder": self._reduce,
            # What was sent must have left before the next step frees its tensors.
            "flush": lambda step: parts.channels.finish(),
        }

    def execute(self, step: Instruction) -> None:
        """Carry out one instruction."""
        weights = self._parts.weights
        if weights is not None and step.kind in COMPUTE_KINDS:
            weights.wait_part(part_of_stage(step.stage, step.kind.startswith("decoder")))
        self._do[step.kind](step)
        self._executed.add(step)

    def _at(self, step: Instruction) -> _Work:
        return self._work.setdefault((step.stage, step.microbatch), _Work())

    def _queue(self, queue: WeightQueue) -> Any:
        return defer_weight_gradients(queue if self._schedule.style.split_backward else None)

    def _post(self, payload: Payload, step: Instruction, target: int, tensors: State) -> None:
        self._mail[payload, step.stage, target, step.microbatch] = tensors

    def _take(self, payload: Payload, source: int, step: Instruction) -> State:
        return self._mail.pop((payload, source, step.stage, step.microbatch))

    def _forward(self, step: Instruction) -> None:
        stage, work = self._parts.stages[step.stage], self._at(step)
        with self._queue(work.encoder_queue):
            if step.stage == 0:
                images = self._batches[step.microbatch].images
                state = stage.embed(images, self._masks[step.microbatch])
            else:
                # A boundary is a cut of the graph: a leaf here, its gradient sent back later.
                received = self._take("activation", step.stage - 1, step)
                training = torch.is_grad_enabled()
                state = tuple(t.detach().requires_grad_(training) for t in received)
                work.inputs = state

            def tap(name: str, tensors: State) -> State:
                onward, leaves = zip(*map(detach_tap, tensors), strict=True)
                work.leaves[name] = list(leaves)
                return onward

            work.outputs = stage.encode(state, tap)
        if step.stage + 1 < self._pipeline.num_stages:
            sent = tuple(tensor.detach() for tensor in work.outputs)
            self._post("activation", step, step.stage + 1, sent)

    def _predict(self, step: Instruction, name: str) -> Tensor:
        tensors = tuple(leaf.tensor for leaf in self._at(step).leaves[name])
        mask = self._masks[step.microbatch]
        return self._parts.stages[step.stage].decode(name, tensors, mask)

    def _add_loss(self, step: Instruction, loss: Loss, predictions: list[Tensor]) -> None:
        m = step.microbatch
        if m not in self._targets:
            # The teacher runs here, inside the schedule: it fills idle time, and features exist
            # only for micro-batches in flight.
            self._targets[m] = self._parts.objective.prepare(self._batches[m], self._masks[m])
        scale = expected_grad_scale(loss.weight, self._schedule.num_microbatches)
        value = self._parts.objective.loss(loss.name, predictions, self._targets[m], scale)
        # In double precision, so that a step's loss has the same bits however many replicas share
        # its micro-batches.
        before = self.losses.get(loss.name, 0.0)
        self.losses[loss.name] = before + value.detach().double()
        if self._backward is not None:
            self._backward(value * loss.weight)

    def _decoder(self, step: Instruction) -> None:
        with self._queue(self._at(step).decoder_queue):
            for loss in self._parts.losses_of(step.stage).values():
                self._add_loss(step, loss, [self._predict(step, name) for name in loss.decoders])

    def _decoder_forward(self, step: Instruction) -> None:
        work, pipeline = self._at(step), self._pipeline
        if pipeline.paired and pipeline.partner(step.stage) == step.stage:
            return  # both halves are here: each pair runs forward and backward at once
        with self._queue(work.decoder_queue):
            for name in self._parts.decoders_of(step.stage):
                work.predictions[name] = self._predict(step, name)
        if pipeline.is_shallow(step.stage):
            sent = tuple(prediction.detach() for prediction in work.predictions.values())
            self._post("prediction", step, pipeline.partner(step.stage), sent)

    def _decoder_backward(self, step: Instruction) -> None:
        work, pipeline = self._at(step), self._pipeline
        partner = pipeline.partner(step.stage)
        if pipeline.is_shallow(step.stage):
            # The deeper stage has evaluated the losses and sent the predictions' gradients.
            if self._backward is not None:
                gradients = self._take("prediction_gradient", partner, step)
                self._backward(gradient_root(tuple(work.predictions.values()), gradients))
            work.predictions = {}
            return
        partners: dict[str, Tensor] = {}
        if pipeline.paired and partner < step.stage:
            received = self._take("prediction", partner, step)
            training = torch.is_grad_enabled()
            partners = {
                name: prediction.detach().requires_grad_(training)
                for name, prediction in zip(self._parts.decoders_of(partner), received, strict=True)
            }
        with self._queue(work.decoder_queue):
            for loss in self._parts.losses_of(step.stage).values():
                ready = partners | work.predictions
                predictions = [
                    ready[name] if name in ready else self._predict(step, name)
                    for name in loss.decoders
                ]
                for name in loss.decoders:
                    work.predictions.pop(name, None)  # its graph ends with this loss
                self._add_loss(step, loss, predictions)
        if partners and self._backward is not None:
            gradients = tuple(map(_gradient, partners.values()))
            self._post("prediction_gradient", step, partner, gradients)

    def _encoder_backward(self, step: Instruction) -> None:
        work, pipeline = self._at(step), self._pipeline
        gradients: tuple[Tensor | None, ...] = (None,) * len(work.outputs)
        if step.stage + 1 < pipeline.num_stages and not pipeline.local_gradients:
            gradients = self._take("gradient", step.stage + 1, step)
        assert self._backward is not None, "evaluation has no backward"
        with self._queue(work.encoder_queue):
            self._backward(gradient_root(work.outputs, gradients))
        if step.stage > 0 and not pipeline.local_gradients:
            self._post("gradient", step, step.stage - 1, tuple(map(_gradient, work.inputs)))
        # Only queued weight gradients of this micro-batch are still needed.
        work.inputs = work.outputs = ()
        work.leaves = {}
        self._targets.pop(step.microbatch, None)

    def _send(self, step: Instruction) -> None:
        # Popped: the channel keeps the tensor as long as the transfer needs it.
        self._parts.channels.send(step, self._mail.pop(step.message))

    def _receive(self, step: Instruction) -> None:
        payload, source, target, m = step.message
        assert payload is not None, f"{step} carries nothing"
        assert source is not None, f"{step} comes from nowhere"
        assert target is not None, f"{step} goes nowhere"
        model, layout = self._parts.stages.config, self._parts.layout
        batch = len(self._batches[m].images)
        rooms = [
            TensorRoom.for_batch(spec, batch, self._parts.precision)
            for spec in message_tensors(model, layout, payload, source, target)
        ]
        self._parts.channels.receive(step, rooms)

    def _wait(self, step: Instruction) -> None:
        self._mail[step.message] = self._parts.channels.wait(step)

    def _reduce(self, step: Instruction) -> None:
        if self._parts.reducer is None:
            return
        completing = last_gradients(self._schedule.style)[step.kind]
        part = part_of_stage(step.stage, step.kind == "reduce_decoders")
        if replace(step, kind=completing) in self._executed:
            self._parts.reducer.start_part(part)
        else:
            self._parts.reducer.arm_part(part)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "nothing downstream used a tensor that crossed a boundary"
    return tensor.grad
