"""One step of the same work by our executor, by torch's pipelines and by DeepSpeed's.

Every function here gives a `Variant`. Torch's stages are ours with the decoders inside the
forward. An auxiliary loss can enter there in two ways, and both are measured: `aux`, an identity
whose backward adds the loss to the stage's, and `fused`, decoders forward and backward at once on a
detached feature. DeepSpeed's losses stand at the end, so features travel to decoders on the last
stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from peer_work import Work
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.pipelining import PipelineStage, schedules

from deepmim_scale.batch import Batch, masking_from_noise
from deepmim_scale.methods import losses_of
from deepmim_scale.models.blocks import initialize
from deepmim_scale.models.stage import Stage, State
from deepmim_scale.models.taps import detach_tap, gradient_root
from deepmim_scale.models.weight_queue import split_weight_gradients
from deepmim_scale.objectives import build_objective
from deepmim_scale.parallel.executor import Executor
from deepmim_scale.parallel.p2p import Channels
from deepmim_scale.parallel.stages import build_rank
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.registry import build_schedule, find_schedule
from deepmim_scale.plan.partition import Layout, format_layout, parse_layout
from deepmim_scale.plan.resolve import TrainingPlan
from deepmim_scale.plan.timing import memory_of, pipeline_of
from deepmim_scale.precision import Precision

CPU = torch.device("cpu")
TIMEOUT = 300.0


@dataclass(frozen=True)
class Variant:
    """A pipeline that can take one step."""

    step: Callable[[], dict[str, Tensor]]
    """Runs a step without an update; this rank's losses by name, summed over micro-batches."""
    module: nn.Module
    """What this rank holds."""


def even_layout(work: Work, num_stages: int) -> Layout:
    """Equal numbers of blocks; decoders where the model has them."""
    depth, taps = work.model.depth, set(work.model.taps)
    each = depth // num_stages
    cuts = []
    for stage in range(num_stages):
        text, since = "", 0
        for block in range(stage * each + 1, (stage + 1) * each + 1):
            since += 1
            if block in taps:
                text, since = f"{text}{since}d", 0
        cuts.append(text + (str(since) if since else ""))
    return parse_layout("|".join(cuts), work.model)


def ours(work: Work, name: str) -> Variant:
    """Our executor with one of our schedules."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    layout, model = even_layout(work, num_ranks), work.model
    pipeline, split = pipeline_of(model, layout), find_schedule(name).split_backward
    times, memory = work.times(layout, split), memory_of(model, layout, 1)
    built = build_schedule(name, SchedulingProblem(pipeline, work.num_microbatches, times, memory))
    stages = build_rank(model, layout, pipeline, rank, seed=0)
    if split:
        split_weight_gradients(stages)
    for number in pipeline.stages_of(rank):
        work.with_kernels(stages[number])
    channels = Channels(built.schedule, [list(range(num_ranks))], CPU, TIMEOUT)
    plan = TrainingPlan(layout, built, format_layout(layout, model))
    executor = Executor(plan, rank, stages, channels, build_objective(model), Precision.FP32)
    batches, count = work.batches(), work.num_microbatches
    return Variant(lambda: executor.train(batches, lambda loss: (loss / count).backward()), stages)


class _AuxiliaryLoss(Function):
    """Hands a feature on; its backward starts the loss's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return grad, torch.ones(())


class _TorchStage(nn.Module):
    """One of our stages as a framework sees it: decoders are part of its forward."""

    def __init__(self, work: Work, stage: Stage, is_first: bool, fused: bool) -> None:
        super().__init__()
        self.stage = stage
        self._is_first, self._fused = is_first, fused
        self._objective, self._losses = build_objective(work.model), losses_of(work.model)
        self._num_visible = work.model.num_visible
        self.losses: dict[str, Tensor] = {}

    def forward(self, x: Tensor, noise: Tensor, images: Tensor) -> Tensor:
        """Images or hidden state -> hidden state."""
        masking = masking_from_noise(noise, self._num_visible)
        targets = None

        def loss_of(name: str, feature: Tensor) -> Tensor:
            nonlocal targets
            if targets is None:
                targets = self._objective.prepare(Batch(images, noise), masking)
            prediction = self.stage.decode(name, (feature,), masking)
            loss = self._objective.loss(name, [prediction], targets, 1.0)
            self.losses[name] = self.losses.get(name, 0.0) + loss.detach().double()
            return loss

        def tap(name: str, tensors: State) -> State:
            (hidden,) = tensors
            if not torch.is_grad_enabled():  # while shapes are inferred
                return tensors
            if self._fused:
                onward, leaf = detach_tap(hidden)
                loss_of(name, leaf.tensor).backward()
                return (onward.clone(),)  # torch detaches what a stage returns, in place
            return (_AuxiliaryLoss.apply(hidden, loss_of(name, hidden)),)

        state = self.stage.embed(x, masking) if self._is_first else (x,)
        return self.stage.encode(state, tap)[0]


def _built_stage(work: Work, layout: Layout, number: int) -> Stage:
    stage = Stage(work.model, layout[number].first + 1, layout[number].last)
    initialize(stage, 0)
    return work.with_kernels(stage)


def torchs(work: Work, name: str, fused: bool) -> Variant:
    """A schedule of torch.distributed.pipelining; ValueError where it does not fit."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    kind = getattr(schedules, f"Schedule{name}")
    several = issubclass(kind, schedules.PipelineScheduleMulti)
    num_stages = 2 * num_ranks if several else num_ranks
    layout = even_layout(work, num_stages)
    mine = [rank]
    if name in ("ZBVZeroBubble", "DualPipeV"):
        mine = [rank, num_stages - 1 - rank]
    elif several:
        mine = [rank, rank + num_ranks]
        if num_ranks == 4:
            # An even cut would put all decoders on two ranks.
            each = work.model.depth // 8
            text = f"{each}|{each}d|{2 * each}d|{each}|{each}d|1|1|{2 * each - 2}d"
            layout = parse_layout(text, work.model)
    modules = [_TorchStage(work, _built_stage(work, layout, s), s == 0, fused) for s in mine]
    batches, model = work.batches(), work.model
    images = batches[0].images
    hidden = torch.zeros(len(images), model.num_visible + 1, model.embed_dim, requires_grad=True)
    stages = [
        PipelineStage(
            module,
            number,
            num_stages,
            CPU,
            input_args=(images if number == 0 else hidden,),
            output_args=(hidden,),
        )
        for module, number in zip(modules, mine, strict=True)
    ]
    schedule = kind(
        stages if several else stages[0],
        work.num_microbatches,
        # All losses hang on taps; the last state adds nothing.
        loss_fn=lambda out, target: gradient_root((out,), (None,)),
        scale_grads=True,
    )
    arguments: dict[str, Any] = {
        "kwarg_mbs": [{"noise": batch.noise, "images": batch.images} for batch in batches]
    }
    if 0 in mine:
        arguments["arg_mbs"] = [(batch.images,) for batch in batches]
    is_last = num_stages - 1 in mine
    if is_last:
        arguments["target_mbs"] = [batch.images for batch in batches]

    def step() -> dict[str, Tensor]:
        for module in modules:
            module.losses = {}
        schedule.step(return_outputs=False, **arguments, **({"losses": []} if is_last else {}))
        return {name: loss for module in modules for name, loss in module.losses.items()}

    return Variant(step, nn.ModuleList(modules))


class _Block(nn.Module):
    """A layer of DeepSpeed's: (order of patches, tapped features.., hidden) -> the same."""

    def __init__(self, work: Work, number: int) -> None:
        super().__init__()
        self.stage = Stage(work.model, number, number)
        initialize(self.stage, 0)
        work.with_kernels(self.stage)
        self.stage.decoders = nn.ModuleDict()  # they stand in the last layer
        self._number, self._is_tapped = number, number in work.model.taps
        self._num_visible = work.model.num_visible

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One block; a tapped feature stays behind the others."""
        if self._number == 1:
            images, order = inputs
            masking = masking_from_noise(order.float(), self._num_visible)
            kept, (hidden,) = (order,), self.stage.embed(images, masking)
        else:
            *kept, hidden = inputs
        (hidden,) = self.stage.encode((hidden,), lambda name, tensors: tensors)
        return (*kept, hidden, hidden.clone()) if self._is_tapped else (*kept, hidden)


class _Decoders(nn.Module):
    """All decoders, on the last stage."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        whole = Stage(work.model, 1, work.model.depth)
        initialize(whole, 0)
        self.decoders = work.with_kernels(whole).decoders
        self._num_visible = work.model.num_visible

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(order, four features, hidden) -> predictions."""
        order, *features, hidden = inputs
        masking = masking_from_noise(order.float(), self._num_visible)
        found = zip(self.decoders.values(), features, strict=True)
        first, *others = [decoder(feature, masking=masking) for decoder, feature in found]
        return (first + 0 * hidden.sum(), *others)


def deepspeeds(work: Work) -> Variant:
    """DeepSpeed's PipelineModule with ZeRO-1, cut by parameters; its step includes an update."""
    names = list(losses_of(work.model))
    objective, count = build_objective(work.model), work.num_microbatches
    losses: dict[str, Tensor] = {}

    def loss_of(predictions: tuple[Tensor, ...], label: tuple[Tensor, ...]) -> Tensor:
        images, order = label
        masking = masking_from_noise(order.float(), work.model.num_visible)
        targets = objective.prepare(Batch(images, order.float()), masking)
        total = torch.zeros(())
        for name, prediction in zip(names, predictions, strict=True):
            loss = objective.loss(name, [prediction], targets, 1 / count)
            losses[name] = losses.get(name, 0.0) + loss.detach().double()
            total = total + loss
        return total

    layers = [LayerSpec(_Block, work, n) for n in range(1, work.model.depth + 1)]
    module = PipelineModule(
        [*layers, LayerSpec(_Decoders, work)],
        num_stages=dist.get_world_size(),
        loss_fn=loss_of,
        partition_method="parameters",
    )
    size = len(work.batches()[0].images)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={
            "train_batch_size": count * size,
            "train_micro_batch_size_per_gpu": size,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        },
    )

    def samples() -> Iterator[tuple[Any, Any]]:
        for batch in itertools.cycle(work.batches()):
            pair = batch.images, batch.noise.long()
            yield pair, pair

    source = samples()

    def step() -> dict[str, Tensor]:
        losses.clear()
        engine.train_batch(data_iter=source)
        return dict(losses)

    return Variant(step, module)


def variants(work: Work) -> dict[str, Callable[[], Variant]]:
    """All pipelines by the names of the table."""
    found: dict[str, Callable[[], Variant]] = {
        f"ours {name}": lambda name=name: ours(work, name) for name in ("1f1b", "dib", "dib_w")
    }
    for name in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        found[f"torch {name}"] = lambda name=name: torchs(work, name, fused=False)
        if name in ("1F1B", "ZBVZeroBubble"):
            found[f"torch {name} fused"] = lambda name=name: torchs(work, name, fused=True)
    found["DeepSpeed PipelineModule"] = lambda: deepspeeds(work)
    return found
