"""Trains tiny models in pipelines of every legal kind; started by test_pipelines.py.

Usage: torchrun --nproc_per_node N pipelines.py OUT CASES.json; writes OUT.json and OUT.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from deepmim_scale.batch import Batch
from deepmim_scale.checkpoint import networks
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.ds_config import BatchSizes, load_ds_config, precision_of, resolve_ds_config
from deepmim_scale.models import build_model
from deepmim_scale.objectives import build_objective, objective_of
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.pipeline.builders import SchedulingProblem
from deepmim_scale.pipeline.files import schedule_to_json
from deepmim_scale.pipeline.registry import build_schedule, find_schedule
from deepmim_scale.plan import timing
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.partition import format_layout
from deepmim_scale.plan.resolve import TrainingPlan, training_plan
from deepmim_scale.plan.timing import layout_of, memory_of, pipeline_of, times_of
from deepmim_scale.train.optim import parameter_groups
from deepmim_scale.train.runtime import build_runtime

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, LEARNING_RATE, EPS = 2, 3, 1e-2, 1e-4
TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 6,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
MODELS = {
    "mae": {"method": "mae"},
    "deepmim": {"method": "deepmim", "taps": (2, 3, 5, 6)},
    "mirl": {"method": "mirl"},
    "hog": {"method": "deepmim", "target": "hog"},
    "timm": {
        "method": "deepmim",
        "target": "timm:vit_tiny_patch16_224",
        "teacher_dim": 192,
        "img_size": 64,
        "patch_size": 16,
    },
    "toys": {"method": "two_decoders", "target": "color"},
    # Five channels of 16 bits, in images that are no squares.
    "deep": {
        "method": "deepmim",
        "in_chans": 5,
        "img_size": (24, 16),
        "pixel_bits": 16,
        "pixel_mean": (0.5, 0.4, 0.3, 0.2, 0.1),
        "pixel_std": (0.3, 0.2, 0.2, 0.1, 0.1),
    },
}
BY_HAND = "by_hand"


def micro_batch(step: int, m: int, replica: int, config: ModelConfig) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + 10 * m + replica)
    image = config.image_format
    shape = (BATCH, image.channels, *image.size)
    images = torch.randn(shape, generator=generator)
    if image.bits == 16:
        images = torch.randint(2**16, shape, generator=generator).to(torch.uint16)
    return Batch(images, torch.rand(BATCH, config.num_patches, generator=generator))


def write_teacher(file: Path) -> str:
    """Weights for the target of `timm`, the same on every rank."""
    if file.exists():
        return str(file)
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict(), file)
    return str(file)


def write_schedule(file: Path, case: dict[str, Any], model: ModelConfig) -> str:
    """A registered schedule in a file, or one that no builder makes."""
    stages, count, name = case["stages"], case["microbatches"], case["file"]
    if name == BY_HAND:
        ranks = [{"instructions": list(steps_by_hand(rank, count))} for rank in range(2)]
        content = {"format": 1, "schedule": name, "microbatches": count, "style": {}}
        content |= {"layout": "2d1d/2d1d", "ranks": ranks}
    else:
        layout = layout_of(model, stages, case["placement"])
        times = times_of(model, layout, BATCH, 1e9, split=find_schedule(name).split_backward)
        pipeline = pipeline_of(model, layout, case["placement"])
        problem = SchedulingProblem(pipeline, count, times, memory_of(model, layout, BATCH))
        content = schedule_to_json(build_schedule(name, problem).schedule)
        content["layout"] = format_layout(layout, model)
    file.write_text(json.dumps(content))
    return str(file)


def steps_by_hand(rank: int, count: int) -> Iterator[dict[str, Any]]:
    """Kind by kind over all micro-batches; the decoders of both stages run at the same time."""
    for kind in ("forward", "decoder_forward", "decoder_backward", "encoder_backward"):
        for m in range(count):
            step = {"stage": rank, "microbatch": m}
            message = {"peer": 1 - rank, **step}
            message["payload"] = "activation" if kind == "forward" else "gradient"
            crosses = kind in ("forward", "encoder_backward")
            receives = crosses and (kind == "forward") == (rank == 1)
            if receives:
                yield {"kind": "receive", **message}
            yield {"kind": kind, **step}
            if crosses and not receives:
                yield {"kind": "send", **message}
    yield {"kind": "flush", "stage": rank, "microbatch": -1}


def run_config(case: dict[str, Any], folder: Path | None = None) -> RunConfig:
    changes = dict(MODELS[case["method"]])
    if folder is not None and case["method"] == "timm":
        changes["teacher"] = write_teacher(folder / f"teacher{dist.get_rank()}.pt")
    model = ModelConfig(**(TINY | changes))
    keys = ("stages", "schedule", "placement", "layout", "reduction", "gradient_flow", "recompute")
    chosen = {key: case[key] for key in keys if key in case}
    if folder is not None and "file" in case:
        file = folder / f"schedule{dist.get_rank()}.json"
        chosen["schedule_file"] = write_schedule(file, case, model)
    return RunConfig(
        model=model,
        microbatch_size=BATCH,
        clip_grad=case.get("clip", 0.0),
        seed=1,
        eps=EPS,
        timeout=300.0,
        **chosen,
    )


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    content = load_ds_config(str(ROOT / "ds_configs" / f"{case.get('json', 'cpu_fp32')}.json"))
    return content | case.get("settings", {})


class Pipeline:
    """One case's engine and executor on this rank."""

    def __init__(
        self, case: dict[str, Any], checkpoint: Path | None = None, folder: Path | None = None
    ) -> None:
        self.config, self.microbatches = run_config(case, folder), case["microbatches"]
        config = self.config
        self.plan: TrainingPlan = training_plan(config, self.microbatches)
        sizes = BatchSizes(BATCH, self.microbatches, dist.get_world_size() // config.stages)
        settings, _ = resolve_ds_config(settings_of(case), config, sizes)
        teacher = objective_of(config.model).load_teacher(config, networks)
        objective = build_objective(config.model, teacher)
        runtime = build_runtime(
            config, self.plan, settings, torch.device("cpu"), objective, checkpoint
        )
        self.grid, self.rank, self.replica = runtime.grid, runtime.pp_rank, runtime.dp_rank
        self.stages, self.engine = runtime.stages, runtime.engine
        self.channels, self.executor = runtime.channels, runtime.executor
        self.local_gradients: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def kept_gradients(self) -> Iterator[None]:
        """Keep what is summed over the replicas, as it was before."""
        names = {p: name for name, p in global_parameters(self.stages).items()}
        gradients = self.engine.gradients
        start = gradients.start

        def keep(number: int) -> None:
            for parameter in gradients.groups[number].parameters:
                gradient = parameter.grad
                assert gradient is not None, "every parameter has a gradient"
                self.local_gradients[f"gradient{self.replica}.{names[parameter]}"] = (
                    gradient.clone()
                )
            start(number)

        with mock.patch.object(gradients, "start", keep):
            yield

    def step(
        self, number: int, spoil: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, Tensor], float, bool]:
        batches = [
            micro_batch(number, m, self.replica, self.config.model)
            for m in range(self.microbatches)
        ]
        calls = self.executor.num_backward_calls
        with (
            self.kept_gradients() if number == 0 else contextlib.nullcontext(),
            zero.reduced_step(self.engine, self.config.reduction, calls) as backward,
        ):
            losses = self.executor.train(
                batches, (lambda loss: backward(spoil(loss))) if spoil else backward
            )
        norm, applied = zero.apply_step(self.engine, LEARNING_RATE, overlap=True)
        return losses, norm, applied

    def whole(self) -> dict[str, Tensor]:
        """All parameters of replica 0, on every rank."""
        zero_state.flat_weights(self.engine)  # waits for what is still on its way
        mine = {n: p.detach().clone() for n, p in global_parameters(self.stages).items()}
        # Replicas compute with rounded matrices; what is trained are the optimizer's.
        mine |= zero_state.master_weights(self.engine)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine if self.replica == 0 else {})
        return {name: tensor for part in everyone for name, tensor in part.items()}


def reference(case: dict[str, Any], replicas: int) -> tuple[dict[str, Tensor], list[float], float]:
    """Plain PyTorch: parameters, gradient norms and the last step's loss."""
    config = run_config(case)
    model = build_model(config.model, seed=1)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.05), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS
    )
    count = case["microbatches"] * replicas
    precision = precision_of(settings_of(case))
    norms, loss = [], 0.0
    for step in range(STEPS):
        loss = 0.0
        for replica in range(replicas):
            for m in range(case["microbatches"]):
                batch = micro_batch(step, m, replica, config.model)
                with zero.autocast(precision, torch.device("cpu")):
                    out = model(batch.images, noise=batch.noise)
                (out.loss / count).backward()
                loss += out.loss.item() / count
        largest = config.clip_grad or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), largest).item())
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), norms, loss


def run_case(case: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pipeline = Pipeline(case, folder=folder)
    replicas = pipeline.grid.get_data_parallel_world_size()
    norms, total, applied, scales = [], 0.0, [], []
    steps = case.get("steps", STEPS if case.get("compare", True) else 2)
    for number in range(steps):
        spoil = None
        if case.get("infinite_stage") == pipeline.rank and number == 1:
            factor = float(case["factor"])
            spoil = lambda loss: loss * factor  # noqa: E731, B023
        losses, norm, done = pipeline.step(number, spoil)
        norms.append(norm)
        applied.append(done)
        scales.append(zero.loss_scale(pipeline.engine))
    weight = 1 / 3 if case["method"] == "mirl" else 1.0
    mine = sum(float(loss) for loss in losses.values()) * weight
    summed = torch.tensor(mine / pipeline.microbatches / replicas, dtype=torch.float64)
    dist.all_reduce(summed)
    total = float(summed)
    parameters = pipeline.whole()
    result: dict[str, Any] = {"layout": pipeline.plan.text, "norms": [norms]}
    votes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(votes, [applied, scales])
    result["votes"] = votes
    if case.get("compare", True) and dist.get_rank() == 0:
        expected, expected_norms, expected_loss = reference(case, replicas)
        result["difference"] = max(
            (parameters[name] - value).abs().max().item() for name, value in expected.items()
        )
        result["missing"] = sorted(set(expected) ^ set(parameters))
        result["norms"] = [norms, expected_norms]
        result["loss"] = [total, expected_loss]
    sent: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sent, dict(pipeline.channels.bytes_sent))
    expected_bytes: dict[str, int] = {}
    graph = pipeline.plan.built.schedule.pipeline
    precision = precision_of(settings_of(case))
    for message in transfers_of(pipeline.config.model, pipeline.plan.layout, BATCH, precision):
        if graph.rank_of(message.source) != graph.rank_of(message.target):
            count = steps * pipeline.microbatches * replicas
            before = expected_bytes.get(message.payload, 0)
            expected_bytes[message.payload] = before + message.num_bytes * count
    counted: dict[str, int] = {}
    for part in sent:
        for payload, number in part.items():
            counted[payload] = counted.get(payload, 0) + number
    result["bytes"] = [counted, expected_bytes]
    if case.get("keep_gradients"):
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, pipeline.local_gradients)
        parameters |= {name: tensor for part in parts for name, tensor in part.items()}
    pipeline.channels.close()
    return result, parameters


def main() -> None:
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / "tests/unit/test_registries.py"))["register_toys"]()
    out, cases = Path(sys.argv[-2]), json.loads(Path(sys.argv[-1]).read_text())
    # So small a model would be summed in one piece.
    timing.PIECE_PARAMETERS = 1
    zero.init_processes(timeout_seconds=300)
    # The CPU accelerator refuses fp16, although torch's CPU kernels are enough for its arithmetic.
    accelerator = type(deepspeed.accelerator.get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]
    results, tensors = {}, {}
    for name, case in cases.items():
        results[name], parameters = run_case(case, out.parent)
        tensors |= {f"{name}/{key}": value.clone() for key, value in parameters.items()}
    if dist.get_rank() == 0:
        out.with_suffix(".json").write_text(json.dumps(results))
        save_file(tensors, out.with_suffix(".safetensors"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
