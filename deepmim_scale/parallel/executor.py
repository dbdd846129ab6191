"""Runs one rank's list of instructions (pipeline/ir.py) over real stages and messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepmim_scale.batch import Batch
from deepmim_scale.objectives import Objective
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.clock import Clock
from deepmim_scale.parallel.gradients import GradientReducer
from deepmim_scale.parallel.p2p import Channels, channels_of
from deepmim_scale.parallel.stages import RankStages
from deepmim_scale.parallel.step import Backward, RankParts, Step
from deepmim_scale.parallel.weights import WeightGatherer
from deepmim_scale.pipeline.ir import COMPUTE_KINDS, Instruction, Kind, Schedule
from deepmim_scale.plan.resolve import TrainingPlan
from deepmim_scale.precision import Precision

EVALUATION_KINDS = frozenset({"forward", "decoder", "decoder_forward", "decoder_backward", "flush"})
EVALUATION_PAYLOADS = frozenset({"activation", "prediction"})


class Executor:
    """One rank of a pipeline."""

    def __init__(
        self,
        plan: TrainingPlan,
        pp_rank: int,
        stages: RankStages,
        channels: Channels,
        objective: Objective,
        precision: Precision,
        reducer: GradientReducer | None = None,
        weights: WeightGatherer | None = None,
    ) -> None:
        self.schedule = plan.built.schedule
        self._parts = RankParts(
            plan.layout, pp_rank, stages, channels, objective, precision, reducer, weights
        )
        self._device = next(stages.parameters()).device
        self._clock = Clock(self._device)
        self.marks: list[tuple[Instruction, Any, Any]] = []
        """The last step's instructions with the clock's marks of start and end."""
        # Until the first step a failure is told as one of the flush, which comes between steps.
        self._current = self._instructions[-1]

    @property
    def _instructions(self) -> tuple[Instruction, ...]:
        return self.schedule.ranks[self._parts.pp_rank]

    def replace_schedule(self, schedule: Schedule) -> None:
        """Go on with another order of the same work, over the channels that there are."""
        style, channels = schedule.style, channels_of(schedule)
        assert style.split_backward == self.schedule.style.split_backward, (
            "the layers are made for queued weight gradients, or they are not"
        )
        assert channels == channels_of(self.schedule), "the new schedule needs other channels"
        self.schedule = schedule

    @property
    def num_backward_calls(self) -> int:
        """How often one step calls `backward`."""
        return sum(map(self._backward_calls, self._instructions))

    def _backward_calls(self, step: Instruction) -> int:
        if step.kind == "encoder_backward":
            return 1
        if step.kind in ("decoder", "decoder_backward"):
            is_shallow = self.schedule.pipeline.is_shallow(step.stage)
            return 1 if is_shallow else len(self._parts.losses_of(step.stage))
        return 0

    def train(self, batches: Sequence[Batch], backward: Backward) -> dict[str, Tensor]:
        """One step over M micro-batches; returns this rank's losses, summed over them.

        `backward` is called with scalars, num_backward_calls times.
        """
        return self._execute(self._instructions, batches, backward)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """This rank's losses of one batch, without gradients; every rank must call it."""
        # The first micro-batch's forward half of the training schedule: one truth for the order.
        steps = [
            step
            for step in self._instructions
            if step.microbatch <= 0
            and (step.kind in EVALUATION_KINDS or step.payload in EVALUATION_PAYLOADS)
        ]
        return self._execute(steps, [batch], None)

    def _execute(
        self,
        instructions: Sequence[Instruction],
        batches: Sequence[Batch],
        backward: Backward | None,
    ) -> dict[str, Tensor]:
        step = Step(self._parts, self.schedule, batches, backward)
        self.marks = []
        # Entered once, so that the 16-bit copies of the weights serve all micro-batches.
        with zero.autocast(self._parts.precision, self._device):
            for instruction in instructions:
                self._current = instruction
                # Marks cost microseconds and make every step's idle share and times known.
                began = self._clock.mark()
                step.execute(instruction)
                self.marks.append((instruction, began, self._clock.mark()))
        return step.losses

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
        for step, start, end in self.marks:
            if step.kind in COMPUTE_KINDS:
                seconds = self._clock.seconds(start, end)
                found.setdefault((step.kind, step.stage), []).append(seconds)
        return {key: sum(values) / len(values) for key, values in found.items()}

    def busy_and_step_seconds(self) -> tuple[float, float]:
        """Seconds of the last step in which this rank computed, and seconds of the whole step."""
        count = self.schedule.num_microbatches
        busy = sum(count * seconds for seconds in self.seconds().values())
        return busy, self._clock.seconds(self.marks[0][1], self.marks[-1][2])
