"""Time the fused kernels against eager torch and torch.compile, forward and backward.

    python benchmarks/kernel_speed.py --output benchmarks/results/kernel_speed.csv --plot speed.png

Every provider's time is given as median, 20th and 80th percentile (ms), with the share of a copy's
bandwidth that the necessary bytes reach, both measured in the same run, and the peak memory of one
step (MiB). Steps are replayed as CUDA graphs; `python_ms` is the median of the same step called
from Python. Inputs rotate through sets of which a fused kernel touches more than four times the L2
cache. Without a GPU the byte model and the ahead-of-time table are printed instead of times.

Shapes: B batch; 224 x 224 images in 196 patches of 16 x 16, 49 of them visible.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepmim_kernels import decoder_assemble, gather_patches, masked_cosine, masked_mse, reference
from deepmim_kernels._dispatch import Backend
from deepmim_kernels.bytes import count_bytes
from gpu_timing import (
    Inputs,
    Row,
    Step,
    copy_bandwidth,
    environment,
    peak_mib,
    percentiles,
    recorded,
    timed,
    write_csv,
)
from torch import Tensor

SCALE: dict[str, Any] = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
L2_FACTOR = 4
Loss = Callable[[Inputs, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """An operation: its inputs, its providers, and the bytes that it has to move.

    `necessary` gives, by provider, every input read once and every result written once; the first
    is for the inputs that eager gets. Other providers are counted operation by operation.
    """

    inputs: Callable[[int, torch.dtype, str, int], Inputs]
    providers: dict[str, Step]
    necessary: Callable[[Inputs], dict[str, float]]


def random_tensors(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, device: str, grad: bool = True
) -> list[Tensor]:
    made = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    return [x.requires_grad_(grad) for x in made]


def masking(batch: int, device: str) -> Inputs:
    shuffle = torch.rand(batch, 196, device=device).argsort(dim=1)
    return {
        "visible": shuffle[:, :49].contiguous(),
        "masked": shuffle[:, 49:].contiguous(),
        "restore": shuffle.argsort(dim=1),
        "mask": torch.ones(batch, 196, device=device).scatter(1, shuffle[:, :49], 0.0),
    }


def loss_inputs(dim: int) -> Callable[[int, torch.dtype, str, int], Inputs]:
    """Dense predictions with CLS for eager, packed ones of the masked patches for training."""

    def make(batch: int, dtype: torch.dtype, device: str, decoders: int) -> Inputs:
        pixels = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8, device=device)
        if device != "meta":
            pixels.random_(0, 256)
        images = reference.normalize(pixels, *SCALE.values(), torch.float32)
        return {
            **masking(batch, device),
            "uint8": pixels,
            "images": images,
            "teacher": random_tensors(1, (batch, 197, dim), dtype, device, grad=False)[0],
            "dense": random_tensors(decoders, (batch, 197, dim), dtype, device),
            "packed": random_tensors(decoders, (batch, 147, dim), dtype, device),
        }

    return make


def assemble_inputs(
    tables: torch.dtype | None, batch: int, dtype: torch.dtype, device: str, decoders: int
) -> Inputs:
    """Tokens as a Linear under autocast gives them; parameters and the result in `tables`."""
    tables = tables or dtype
    return {
        **masking(batch, device),
        "tokens": random_tensors(decoders, (batch, 50, 512), dtype, device),
        "mask_token": random_tensors(1, (1, 1, 512), tables, device)[0],
        "pos": random_tensors(1, (1, 197, 512), tables, device, grad=False)[0],
        "upstream": random_tensors(1, (batch, 197, 512), tables, device, grad=False)[0],
    }


def for_each_decoder(losses: dict[str, Loss]) -> dict[str, Step]:
    """Forward and backward of all decoders' losses, by provider."""

    def step(loss: Loss, key: str, x: Inputs) -> object:
        return torch.autograd.grad([loss(x, pred) for pred in x[key]], x[key])

    return {
        name: partial(step, loss, "packed" if name.endswith("packed") else "dense")
        for name, loss in losses.items()
    }


def eager_target(images: Tensor) -> Tensor:
    return reference.normalize_patches(reference.patchify(images, 16))


def eager_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """MAE's expression on a dense prediction with CLS."""
    return (((pred[:, 1:] - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()


def shared_target_mse(x: Inputs) -> object:
    target = eager_target(x["images"])
    losses = [eager_mse(pred, target, x["mask"]) for pred in x["dense"]]
    return torch.autograd.grad(losses, x["dense"])


def whole_mse(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return eager_mse(pred, eager_target(images), mask)


compiled_mse = torch.compile(whole_mse, dynamic=False)


def eager_cosine(pred: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """DeepMIM's expression on dense tokens with CLS."""
    norm = partial(torch.linalg.vector_norm, dim=-1, keepdim=True, dtype=torch.float32)
    pred, teacher = pred[:, 1:], teacher[:, 1:]
    cosine = (pred / norm(pred) * (teacher / norm(teacher))).sum(dim=-1)
    return ((2 - 2 * cosine) * mask).sum() / mask.sum()


compiled_cosine = torch.compile(eager_cosine, dynamic=False)


def eager_assemble(tokens: Tensor, mask_token: Tensor, pos: Tensor, restore: Tensor) -> Tensor:
    """MAE's forward_decoder up to its blocks, with its repeats."""
    masks = mask_token.repeat(tokens.shape[0], restore.shape[1] + 1 - tokens.shape[1], 1)
    index = restore.unsqueeze(-1).repeat(1, 1, tokens.shape[2])
    patches = torch.gather(torch.cat([tokens[:, 1:], masks], dim=1), 1, index)
    return torch.cat([tokens[:, :1], patches], dim=1) + pos


def assembling(function: Callable[..., Tensor]) -> Step:
    def step(x: Inputs) -> None:
        for tokens in x["tokens"]:
            out = function(tokens, x["mask_token"], x["pos"], x["restore"])
            torch.autograd.grad(out, (tokens, x["mask_token"]), x["upstream"])

    return step


def gathering(backend: Backend) -> Step:
    return lambda x: gather_patches(
        x["uint8"], x["visible"], patch_size=16, backend=backend, **SCALE
    )


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def mse_necessary(x: Inputs) -> dict[str, float]:
    packed, masked = size(*x["packed"]), 0.75 * len(x["packed"])
    return {
        "triton": packed + size(*x["dense"]) + masked * size(x["images"]),
        "triton packed": 2 * packed + masked * size(x["uint8"]),
    }


def assemble_necessary(x: Inputs) -> dict[str, float]:
    tables = size(x["pos"], x["mask_token"])
    one = 2 * size(x["tokens"][0]) + 2 * size(x["upstream"]) + tables
    return {"triton": len(x["tokens"]) * one}


MSE: dict[str, Loss] = {
    "eager": lambda x, p: whole_mse(p, x["images"], x["mask"]),
    "torch.compile": lambda x, p: compiled_mse(p, x["images"], x["mask"]),
    "triton": lambda x, p: masked_mse(
        p, x["images"], mask=x["mask"], patch_size=16, prefix_tokens=1
    ),
    "triton packed": lambda x, p: masked_mse(
        p, x["uint8"], ids=x["masked"], patch_size=16, **SCALE
    ),
}
COSINE: dict[str, Loss] = {
    "eager": lambda x, p: eager_cosine(p, x["teacher"], x["mask"]),
    "torch.compile": lambda x, p: compiled_cosine(p, x["teacher"], x["mask"]),
    "triton packed": lambda x, p: masked_cosine(
        p, x["teacher"], ids=x["masked"], teacher_prefix_tokens=1
    ),
}
ASSEMBLE: dict[str, Callable[..., Tensor]] = {
    "eager": eager_assemble,
    "torch.compile": torch.compile(eager_assemble, dynamic=False),
    "triton": decoder_assemble,
}
WORKLOADS = {
    "masked_mse": Workload(
        loss_inputs(768),
        {"eager shared target": shared_target_mse, **for_each_decoder(MSE)},
        mse_necessary,
    ),
    "masked_cosine": Workload(
        loss_inputs(512),
        for_each_decoder(COSINE),
        lambda x: {"triton packed": 3 * size(*x["packed"])},
    ),
    **{
        name: Workload(
            partial(assemble_inputs, tables),
            {provider: assembling(function) for provider, function in ASSEMBLE.items()},
            assemble_necessary,
        )
        # fp32 parameters under autocast, and parameters of the tokens' own dtype.
        for name, tables in (("decoder_assemble", torch.float32), ("decoder_assemble_pure", None))
    },
    "gather_patches": Workload(
        loss_inputs(1),
        {"eager": gathering("torch"), "triton": gathering("auto")},
        lambda x: {"triton": x["visible"].numel() * 768 * (1 + 4)},
    ),
}


def model_bytes(workload: Workload, provider: str, shapes: Inputs) -> float | None:
    """Bytes that a provider moves by the model; None for the compiler, which decides itself."""
    if provider == "torch.compile":
        return None
    necessary = workload.necessary(shapes).get(provider)
    return necessary or count_bytes(lambda: workload.providers[provider](shapes))


def print_byte_model(dtype: str, decoders: int) -> None:
    print(f"byte model, forward and backward, B = 128, {dtype}, decoders: {decoders}")
    print(f"{'operation':22}{'provider':22}{'MB':>9}{'x least':>10}")
    for op, workload in WORKLOADS.items():
        shapes = workload.inputs(128, DTYPES[dtype], "meta", decoders)
        least = min(workload.necessary(shapes).values())
        for provider in workload.providers:
            moved = model_bytes(workload, provider, shapes)
            if moved is not None:
                print(f"{op:22}{provider:22}{moved / 1e6:9.1f}{moved / least:10.1f}")


def measure(op: str, batch: int, dtype: str, decoders: int, copy: float) -> Iterator[Row]:
    """A row for every provider of one operation; `copy` is the bandwidth in bytes/s.

    Megabytes are 1e6 bytes; `necessary_mb` is what the provider's inputs and results come to,
    `model_*` what the byte model predicts that it moves.
    """
    workload = WORKLOADS[op]
    shapes = workload.inputs(batch, DTYPES[dtype], "meta", decoders)
    necessary = workload.necessary(shapes)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = int(L2_FACTOR * cache / min(necessary.values())) + 2
    sets = [workload.inputs(batch, DTYPES[dtype], "cuda", decoders) for _ in range(count)]
    for provider, step in workload.providers.items():
        replayed = percentiles(timed(recorded(step, sets), sets))
        seconds = replayed["median_ms"] / 1e3
        needed = necessary.get(provider, next(iter(necessary.values())))
        moved = model_bytes(workload, provider, shapes)
        yield {
            "op": op,
            "provider": provider,
            "batch": batch,
            "dtype": dtype,
            "decoders": decoders,
            **replayed,
            "python_ms": percentiles(timed(step, sets))["median_ms"],
            "necessary_mb": round(needed / 1e6, 1),
            "percent_of_copy": round(100 * needed / seconds / copy, 1),
            "peak_mib": round(peak_mib(step, sets[0]), 1),
            "model_mb": moved and round(moved / 1e6, 1),
            "model_ms": moved and round(moved / copy * 1e3, 4),
            "copy_gb_per_s": round(copy / 1e9, 1),
            **environment(),
        }


def plot(rows: list[Row], path: Path) -> None:
    """Median time over batch size, one panel per operation."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = pyplot.subplots(1, len(ops), figsize=(4 * len(ops), 3.5), squeeze=False)
    for axis, op in zip(axes[0], ops, strict=True):
        for provider in WORKLOADS[op].providers:
            line = [row for row in rows if (row["op"], row["provider"]) == (op, provider)]
            x, y = ([row[key] for row in line] for key in ("batch", "median_ms"))
            axis.plot(x, y, "o-", label=provider)
        axis.set(title=op, xlabel="batch", ylabel="forward + backward, ms", yscale="log")
        axis.legend(fontsize=7)
    figure.suptitle("{gpu}, torch {torch}, triton {triton}".format(**rows[0]))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--decoders", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        from deepmim_kernels import aot

        print("no GPU: the byte model and the ahead-of-time table instead of times\n")
        print_byte_model(args.dtype, args.decoders)
        print(flush=True)
        return aot.main([])
    copy = copy_bandwidth()
    print(f"copy: {copy / 1e9:.0f} GB/s on {torch.cuda.get_device_name()}")
    rows = []
    for op, batch in itertools.product(args.op, args.batch):
        for row in measure(op, batch, args.dtype, args.decoders, copy):
            print(
                "{op:22}B {batch:<5}{provider:22}{median_ms:9.3f} ms "
                "{percent_of_copy:6.1f} % of copy {peak_mib:8.1f} MiB".format(**row),
                flush=True,
            )
            rows.append(row)
    if args.output:
        write_csv(rows, args.output)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
