"""Fine-tuning runs in 1, 2 or 3 gloo processes, as JSON; started by test_finetune.py.

Usage: torchrun --nproc_per_node N finetune_runs.py FOLDER DATA; the run of one process comes first.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepmim_scale.checkpoint.sizes import EncoderSizes
from deepmim_scale.ds_config import BatchSizes, load_ds_config, resolve_ds_config
from deepmim_scale.evaluate.frozen import open_frozen
from deepmim_scale.evaluate.heads import AttentiveHead
from deepmim_scale.evaluate.trained_probe import Contestant, ProbePlan, TrainedProbe
from deepmim_scale.finetune.data import open_labelled
from deepmim_scale.finetune.prepare import prepare
from deepmim_scale.finetune.settings import FinetuneConfig
from deepmim_scale.finetune.trainer import Finetuner, evaluate_once
from deepmim_scale.finetune.transform import evaluation_transform, probe_transform
from deepmim_scale.models.classifier import build_classifier
from deepmim_scale.parallel import zero
from deepmim_scale.runs.folder import list_checkpoints, read_metrics
from deepmim_scale.train.optim import finetune_groups

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EPS = 1e-4  # attention's key bias has no gradient: with 1e-8 AdamW would turn rounding into steps


def config(data: Path, output: Path, **changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "data": str(data),
        "output": str(output),
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "microbatch_size": 4,
        "global_batch": 8,
        "epochs": 3.0,
        "warmup_epochs": 0.5,
        "blr": 0.05,
        "ema_decay": 0.9,
        "save_every": 4,
        "keep_checkpoints": 9,
        "loader_workers": 0,
    }
    return FinetuneConfig(**(fields | changes))


def finished(run: Path) -> dict[str, Tensor]:
    """All that the last checkpoint holds: weights, moments, average."""
    last = list_checkpoints(run)[-1]
    return {f"{f.stem}/{n}": t for f in last.glob("*.safetensors") for n, t in load_file(f).items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the largest number of each kind of file."""
    assert one.keys() == other.keys()
    scales = {k.split("/")[0]: 0.0 for k in one}
    for name, value in one.items():
        kind = name.split("/")[0]
        scales[kind] = max(scales[kind], value.abs().max().item())
    return max(
        (one[name] - other[name]).abs().max().item() / scales[name.split("/")[0]] for name in one
    )


def run_of(settings: FinetuneConfig) -> Finetuner:
    tuner = Finetuner(prepare(settings), CPU)
    tuner.run()
    return tuner


def interrupted(full: Path, copy: Path) -> None:
    """The folder as a kill after the fourth step's checkpoint leaves it."""
    if dist.get_rank() == 0:
        shutil.copytree(full, copy)
        for later in list_checkpoints(copy)[1:]:
            shutil.rmtree(later)
    dist.barrier()


def counts(data: Path, output: Path) -> dict[str, Any]:
    settings = config(data, output, evaluates_only=True)
    settings = settings.replace(weights=str(output / "last.safetensors"), microbatch_size=64)
    counter = evaluate_once(prepare(settings), CPU)
    return {"counts": counter.counts[""]}


def one(folder: Path, data: Path) -> dict[str, Any]:
    run_of(config(data, folder / "full"))
    interrupted(folder / "full", folder / "again")
    tuner = run_of(config(data, folder / "again", loader_workers=2))
    first, second = finished(folder / "full"), finished(folder / "again")
    rows = [read_metrics(folder / name) for name in ("full", "again")]
    keys = ("step", "loss", "grad_norm", "accuracy", "ema_accuracy", "validation_loss")
    plain = [[{key: row.get(key) for key in keys} for row in run] for run in rows]
    save_file(probe(folder, data), folder / "probe.safetensors")
    published = [load_file(folder / name / "last.safetensors") for name in ("full", "again")]
    return {
        "began after": tuner.start.step,
        "equal bits": first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first),
        "equal rows": plain[0] == plain[1],
        "equal files": all(torch.equal(published[0][n], published[1][n]) for n in published[0]),
        "kinds": sorted({name.split("/")[0] for name in first}),
        **counts(data, folder / "full"),
    }


def probe(folder: Path, data: Path) -> dict[str, Tensor]:
    """An attentive head after four steps on the fine-tuned encoder's frozen tokens."""
    encoder, _ = open_frozen(str(folder / "full/last.safetensors"), blocks=(3,))
    sources = open_labelled(str(data), "", "fail")
    transforms = probe_transform(16, min_crop=0.5, flip=0.5), evaluation_transform(16)
    plan = ProbePlan(4, 6, lambda peak, step: peak, transforms, 0.0, 0, 4, 0)
    torch.manual_seed(0)
    head = AttentiveHead(encoder.width, 3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, eps=EPS)
    TrainedProbe(encoder, sources, [Contestant(3, "", head, optimizer, 1e-2)], plan, CPU).run(
        None, {}
    )
    return {f"head/{name}": value for name, value in head.state_dict().items()}


def many_groups() -> float:
    """ZeRO-2 with 28 groups of unequal rates against plain AdamW, after 5 updates."""
    sizes = EncoderSizes(16, 8, 16, 12, 2, 4.0)
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, world, 4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (5, world, 4), generator=generator)
    settings = FinetuneConfig(microbatch_size=4, global_batch=4 * world)
    content = load_ds_config(str(ROOT / "ds_configs" / "cpu_fp32.json"))
    # Left out by a user: DeepSpeed would then clip at 1.
    content.pop("gradient_clipping", None)
    resolved, _ = resolve_ds_config(content, settings, BatchSizes(4, 1, world))
    assert resolved["gradient_clipping"] == 0.0

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build_classifier(sizes, 10, "mean", seed=3)
        groups = finetune_groups(model, 0.05, 0.65)
        assert len(groups) == 28
        return model, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=EPS)

    sharded, optimizer = fresh()
    engine = zero.build_engine(sharded, optimizer, resolved, zero.build_grid(1))
    plain, reference = fresh()
    for step in range(5):
        rate = 1e-3 * (step + 1)
        with zero.reduced_step(engine, "coalesced", 1) as backward:
            backward(10 * cross_entropy(sharded(images[step, rank]), labels[step, rank]))
        zero.apply_step(engine, rate)
        for group in reference.param_groups:
            group["lr"] = rate * group["lr_scale"]
        whole = images[step].flatten(0, 1)
        (10 * cross_entropy(plain(whole), labels[step].flatten())).backward()
        reference.step()
        reference.zero_grad()
    ours, theirs = dict(sharded.named_parameters()), dict(plain.named_parameters())
    return max(
        ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item()
        for name in theirs
        if theirs[name].norm() > 0
    )


def two(folder: Path, data: Path) -> dict[str, Any]:
    interrupted(folder / "full", folder / "wide")
    tuner = run_of(config(data, folder / "wide"))
    return {
        "began after": tuner.start.step,
        "difference": largest_difference(finished(folder / "full"), finished(folder / "wide")),
        "probe": largest_difference(load_file(folder / "probe.safetensors"), probe(folder, data)),
        "28 groups": many_groups(),
        **counts(data, folder / "full"),
    }


def main() -> None:
    folder, data = map(Path, sys.argv[1:])
    zero.init_processes(60.0)
    world = dist.get_world_size()
    what = {1: one, 2: two, 3: lambda folder, data: counts(data, folder / "full")}
    found = what[world](folder, data)
    if dist.get_rank() == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
