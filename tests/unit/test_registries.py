"""A method, a target and a schedule of our own, each added by `register` and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from deepmim_scale import methods, objectives
from deepmim_scale.batch import Batch, Masking
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.images import normalize, patchify
from deepmim_scale.methods.base import Combination, Loss, TensorSpec, any_cut, residual_stream
from deepmim_scale.models import build_model, local_backward
from deepmim_scale.objectives import Objective, ObjectiveSpec
from deepmim_scale.pipeline import registry
from deepmim_scale.pipeline.builders import BuiltSchedule, SchedulingProblem, build_by_formula
from deepmim_scale.pipeline.ir import Durations, Instruction, Kind, Pipeline, Style, stage_kinds
from deepmim_scale.pipeline.registry import ScheduleSpec
from deepmim_scale.pipeline.simulate import Memory, simulate
from deepmim_scale.pipeline.validate import validate
from deepmim_scale.plan.hardware import GPUS
from deepmim_scale.plan.partition import format_layout, partition
from deepmim_scale.plan.planner import Cluster, enumerate_plans
from deepmim_scale.plan.resolve import training_plan
from deepmim_scale.study.cells import build_cells
from deepmim_scale.study.settings import StudyArguments

if TYPE_CHECKING:
    from deepmim_scale.methods import Method


class TwoDecoders:
    """One decoder in the middle, which counts a quarter, and one at the end."""

    name = "two_decoders"
    source = "this test"
    paired = carries = local_gradients = free_taps = False
    combinations: tuple[Combination, ...] = (Combination("linear", any_cut),)

    def taps(self, depth: int, num_segments: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
        return (depth // 2, depth)

    def check(self, model: ModelConfig) -> None: ...

    def decoder_names(self, model: ModelConfig) -> tuple[str, ...]:
        return ("middle", "end")

    def losses(self, model: ModelConfig) -> tuple[Loss, ...]:
        return (Loss("half", ("middle",), 0.25), Loss("whole", ("end",), 1.0))

    def boundary(self, model: ModelConfig, block: int) -> tuple[TensorSpec, ...]:
        return (residual_stream(model),)

    def official_prefixes(self, model: ModelConfig) -> dict[str, str]:
        return {}


class ColorObjective(Objective):
    """Squared error to the mean color [B, L-K, C] of each masked patch."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def prepare(self, batch: Batch, masking: Masking) -> Tensor:
        patches = patchify(normalize(batch.images), self._model.patch_size)
        colors = patches.unflatten(2, (-1, self._model.in_chans)).mean(2)
        ids = masking.ids_masked[..., None].expand(-1, -1, colors.shape[-1])
        return colors.gather(1, ids)

    def loss(
        self, name: str, predictions: Sequence[Tensor], targets: Tensor, grad_scale: float
    ) -> Tensor:
        return (predictions[0] - targets).square().mean()


COLOR = ObjectiveSpec(
    "color", lambda model: model.in_chans, lambda model, teacher: ColorObjective(model)
)
FORWARD: tuple[Kind, ...] = ("forward", "decoder_forward")
BACKWARD: tuple[Kind, ...] = ("decoder_backward", "encoder_backward")


def in_twos(pipeline: Pipeline, rank: int, num_microbatches: int) -> Iterator[Instruction]:
    """Two micro-batches forward, the same two backward, and so on."""
    for first in range(0, num_microbatches, 2):
        pair = range(first, min(first + 2, num_microbatches))
        for kinds, m in product((FORWARD, BACKWARD), pair):
            present = stage_kinds(pipeline, rank, Style())
            yield from (Instruction(kind, rank, m) for kind in kinds if kind in present)


def build_twos(name: str, problem: SchedulingProblem) -> BuiltSchedule:
    return build_by_formula(name, problem, in_twos, Style())


TWOS = ScheduleSpec("twos", build_twos, "two forward, two backward", sums_pairs=False)


def register_toys() -> None:
    """What a user's own module would do when it is imported; pipelines.py does it too."""
    method: Method = TwoDecoders()
    methods.register(method)
    objectives.register(COLOR)
    registry.register(TWOS)


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    register_toys()
    yield
    del methods.METHODS[TwoDecoders.name]
    del objectives.OBJECTIVES[COLOR.name]
    del registry.SCHEDULES[TWOS.name]


TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 6,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def batch_of(config: ModelConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, config.img_size, config.img_size, generator=generator)
    return images, torch.rand(2, config.num_patches, generator=generator)


@pytest.mark.parametrize("target", ["pixel", "color", "hog"])
def test_a_method_trains(target: str) -> None:
    config = ModelConfig(method="two_decoders", target=target, **TINY)
    assert config.taps == (3, 6)
    images, noise = batch_of(config)
    joint, local = (build_model(config, seed=3) for _ in range(2))
    out = joint(images, noise=noise)
    assert list(out.losses) == ["half", "whole"]
    torch.testing.assert_close(out.loss, 0.25 * out.losses["half"] + out.losses["whole"])
    out.loss.backward()
    optimizer = torch.optim.SGD(local.parameters(), lr=0.05)
    first = local_backward(local, images, noise=noise)
    for (name, ours), theirs in zip(local.named_parameters(), joint.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad), name
    optimizer.step()
    assert local_backward(local, images, noise=noise).loss < first.loss


def test_a_method_is_cut_and_planned() -> None:
    config = ModelConfig(method="two_decoders", depth=12)
    layout = partition(config, 3)
    assert [stage.decoders for stage in layout if stage.decoders] in ([(0,), (1,)], [(0, 1)])
    assert format_layout(layout, config).count("d") == 2
    cluster = Cluster(1, 4, GPUS["v100-32g"], 25.0)
    plans = enumerate_plans(config, cluster, 256)
    assert {plan.stages for plan in plans} == {1, 2, 4}
    assert {plan.schedule for plan in plans} == {"1f1b", "dib", "dib_w", "twos"}
    assert all(plan.layout.count("d") == 2 for plan in plans)


def test_a_target_counts_in_cost_and_model() -> None:
    config = ModelConfig(target="color", **TINY)
    assert config.out_dim == 3
    assert build_model(config).decoders["block06"].pred.weight.shape == (3, 8)
    plan = training_plan(RunConfig(model=config, stages=2), 4)
    assert len(plan.layout) == 2
    with pytest.raises(ValueError, match="mirl is defined for target pixel"):
        ModelConfig(method="mirl", target="color", **TINY)


@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_a_schedule_is_validated_and_simulated(microbatches: int) -> None:
    config = RunConfig(model=ModelConfig(**TINY), stages=3, schedule="twos")
    built = training_plan(config, microbatches).built
    validate(built.schedule)
    kinds = [(s.kind, s.microbatch) for s in built.schedule.ranks[2] if s.kind == "forward"]
    assert kinds == [("forward", m) for m in range(microbatches)]
    assert 0 < built.timeline.idle_fraction < 1
    mirl = config.replace(model=ModelConfig(method="mirl", **TINY))
    with pytest.raises(ValueError, match="mirl is defined for schedule gpipe, 1f1b, dib; use"):
        training_plan(mirl, 4)


def test_a_schedule_is_slower_than_the_baseline_by_its_bubbles() -> None:
    """Every two micro-batches it fills and drains the pipeline again."""
    config = RunConfig(model=ModelConfig(**TINY), stages=3)
    found = {
        name: training_plan(config.replace(schedule=name), 8).built for name in ("twos", "1f1b")
    }
    assert found["twos"].timeline.makespan > found["1f1b"].timeline.makespan
    assert max(found["twos"].peaks) < max(found["1f1b"].peaks)


def test_a_study_lists_the_schedule() -> None:
    args = StudyArguments(
        output="study",
        preset="debug",
        data="somewhere",
        depths=(12,),
        stages=(1, 2),
        schedules=("1f1b", "twos"),
        nodes=1,
        gpus_per_node=2,
        global_batch=16,
        microbatch_size=2,
        steps=20,
    )
    cells = build_cells(args)
    assert [(cell.stages, cell.schedule) for cell in cells] == [
        (1, "dib"),
        (2, "1f1b"),
        (2, "twos"),
    ]
    assert all(cell.job for cell in cells), [cell.problem for cell in cells]


def test_names_are_listed_to_the_user() -> None:
    with pytest.raises(ValueError, match="choose one of mae, deepmim, mirl, two_decoders"):
        ModelConfig(method="none")
    with pytest.raises(ValueError, match=r"choose one of .*, color"):
        ModelConfig(target="none")
    with pytest.raises(ValueError, match=r"choose one of .*, twos"):
        registry.find_schedule("none")


def test_simulation_of_a_hand_made_pipeline() -> None:
    """Two ranks without decoders, seconds known: 2 forward and 2 backward of one second each."""
    pipeline = Pipeline(2, (False, False))
    durations = Durations(dict.fromkeys(product(("forward", "encoder_backward"), (0, 1)), 1.0), {})
    problem = SchedulingProblem(pipeline, 2, durations, [Memory(1, 0, 0)] * 2)
    built = build_twos("twos", problem)
    # Forward 0-1-2 and 1-2-3, backward 3-4-5 on rank 1 and 4-5-6 on rank 0.
    assert simulate(built.schedule, durations).makespan == 6.0
    assert built.timeline.idle == pytest.approx((1 / 3, 1 / 3))
