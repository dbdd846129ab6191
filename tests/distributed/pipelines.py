"""Trains tiny models in pipelines of every legal kind; started by test_pipelines.py.

Usage: torchrun --nproc_per_node N pipelines.py OUT CASES.json; writes OUT.json and OUT.safetensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from deepmim_scale.batch import Batch
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.ds_config import BatchSizes, load_ds_config, precision_of, resolve_ds_config
from deepmim_scale.models import build_model
from deepmim_scale.objectives import build_objective
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.plan.messages import transfers_of
from deepmim_scale.plan.resolve import TrainingPlan, training_plan
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
}


def micro_batch(step: int, m: int, replica: int, config: ModelConfig) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + 10 * m + replica)
    side = config.img_size
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    return Batch(images, torch.rand(BATCH, config.num_patches, generator=generator))


def run_config(case: dict[str, Any]) -> RunConfig:
    model = ModelConfig(**(TINY | MODELS[case["method"]]))
    keys = ("stages", "schedule", "placement", "layout", "reduction", "gradient_flow", "recompute")
    chosen = {key: case[key] for key in keys if key in case}
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

    def __init__(self, case: dict[str, Any], checkpoint: Path | None = None) -> None:
        self.config, self.microbatches = run_config(case), case["microbatches"]
        config = self.config
        self.plan: TrainingPlan = training_plan(config, self.microbatches)
        sizes = BatchSizes(BATCH, self.microbatches, dist.get_world_size() // config.stages)
        settings, _ = resolve_ds_config(settings_of(case), config, sizes)
        objective = build_objective(config.model)
        runtime = build_runtime(
            config, self.plan, settings, torch.device("cpu"), objective, checkpoint
        )
        self.grid, self.rank, self.replica = runtime.grid, runtime.pp_rank, runtime.dp_rank
        self.stages, self.engine = runtime.stages, runtime.engine
        self.channels, self.executor = runtime.channels, runtime.executor

    def step(
        self, number: int, spoil: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, Tensor], float, bool]:
        batches = [
            micro_batch(number, m, self.replica, self.config.model)
            for m in range(self.microbatches)
        ]
        calls = self.executor.num_backward_calls
        with zero.reduced_step(self.engine, self.config.reduction, calls) as backward:
            losses = self.executor.train(
                batches, (lambda loss: backward(spoil(loss))) if spoil else backward
            )
            if number == 0:  # whole on every rank until the reduction that ends this block
                self.local_gradients = {
                    f"gradient{self.replica}.{name}": p.grad.clone()
                    for name, p in global_parameters(self.stages).items()
                    if p.grad is not None
                }
        norm, applied = zero.apply_step(self.engine, LEARNING_RATE)
        return losses, norm, applied

    def whole(self) -> dict[str, Tensor]:
        """All parameters of replica 0, on every rank."""
        mine = {n: p.detach().clone() for n, p in global_parameters(self.stages).items()}
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


def run_case(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pipeline = Pipeline(case)
    replicas = pipeline.grid.get_data_parallel_world_size()
    norms, total, applied, scales = [], 0.0, [], []
    steps = case.get("steps", STEPS if case.get("compare", True) else 2)
    for number in range(steps):
        spoil = None
        if case.get("infinite_stage") == pipeline.rank and number == 1:
            spoil = lambda loss: loss * float("inf")  # noqa: E731
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
    out, cases = Path(sys.argv[-2]), json.loads(Path(sys.argv[-1]).read_text())
    zero.init_processes(timeout_seconds=300)
    # The CPU accelerator refuses fp16, although torch's CPU kernels are enough for its arithmetic.
    accelerator = type(deepspeed.accelerator.get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]
    results, tensors = {}, {}
    for name, case in cases.items():
        results[name], parameters = run_case(case)
        tensors |= {f"{name}/{key}": value.clone() for key, value in parameters.items()}
    if dist.get_rank() == 0:
        out.with_suffix(".json").write_text(json.dumps(results))
        save_file(tensors, out.with_suffix(".safetensors"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
