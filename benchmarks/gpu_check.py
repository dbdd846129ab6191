"""Everything about the kernels that needs a GPU, in stages of under ten minutes each.

    python benchmarks/gpu_check.py --stage 1    # tests of tests/kernels on the GPU, torch.compile
    python benchmarks/gpu_check.py --stage 2    # warps per program, swept
    python benchmarks/gpu_check.py --stage 3    # speed of every kernel, goals, byte model
    python benchmarks/gpu_check.py --stage 4    # the trainer's step, kernels on and off

Results are written to `--output` (default benchmarks/results): kernel_warps.csv, kernel_speed.csv
with a plot, and kernel_step.csv. Stages 2 to 4 take about a GiB to 30 GiB of GPU memory.
Stage 4 times a run's own engine and executor in one process, without loader and metrics.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import kernel_speed as speed
import torch
from deepmim_kernels import use_backend
from deepmim_kernels._dispatch import Backend
from gpu_timing import (
    Inputs,
    Row,
    Step,
    copy_bandwidth,
    environment,
    percentiles,
    recorded,
    timed,
    write_csv,
)

ROOT = Path(__file__).resolve().parents[1]


def correctness(output: Path) -> bool:
    """The kernel tests as they are: on a GPU they run compiled, not interpreted."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "kernels")]
    tests = subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    return inductor_agrees() and tests


def inductor_agrees() -> bool:
    """A loss inside torch.compile's default compiler gives the bits of the eager call."""
    x = speed.WORKLOADS["masked_mse"].inputs(8, torch.bfloat16, "cuda", 1)
    loss = speed.MSE["triton packed"]
    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        value = function(x, x["packed"][0])
        results.append((value, *torch.autograd.grad(value, x["packed"])))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    print(f"torch.compile(fullgraph=True) equals eager: {same}")
    return same


def sweep(output: Path) -> bool:
    """Time every kernel with 1 to 16 warps per program; the launchers' own choice is row 0."""
    import deepmim_kernels.assemble
    import deepmim_kernels.cosine
    import deepmim_kernels.mse
    import deepmim_kernels.patches

    modules = {
        "masked_mse": deepmim_kernels.mse,
        "masked_cosine": deepmim_kernels.cosine,
        "decoder_assemble": deepmim_kernels.assemble,
        "gather_patches": deepmim_kernels.patches,
    }
    rows: list[Row] = []
    for op, module in modules.items():
        for dtype in ("bf16", "fp32"):
            workload = speed.WORKLOADS[op]
            sets = [workload.inputs(512, speed.DTYPES[dtype], "cuda", 1) for _ in range(2)]
            provider = list(workload.providers)[-1]
            own = module.warps_for
            for warps in (0, 1, 2, 4, 8, 16):
                module.warps_for = fixed(warps) if warps else own
                times = percentiles(timed(recorded(workload.providers[provider], sets), sets))
                print(
                    f"{op:18}{provider:15}{dtype:6}warps {warps:<4}{times['median_ms']:8.3f} ms",
                    flush=True,
                )
                rows.append(
                    {
                        "op": op,
                        "provider": provider,
                        "dtype": dtype,
                        "batch": 512,
                        "warps": warps,
                        **times,
                        **environment(),
                    }
                )
            module.warps_for = own
    write_csv(rows, output / "kernel_warps.csv")
    return True


def fixed(warps: int) -> Callable[[int, int], int]:
    return lambda block, itemsize: warps


def speeds(output: Path) -> bool:
    """The speed table at one and four decoders, then the goals."""
    copy = copy_bandwidth()
    rows = [
        row
        for op in speed.WORKLOADS
        for decoders in (1, 4)
        for batch in (64, 128, 256, 512)
        for row in speed.measure(op, batch, "bf16", decoders, copy)
    ]
    write_csv(rows, output / "kernel_speed.csv")
    speed.plot([row for row in rows if row["decoders"] == 1], output / "kernel_speed.png")
    return judge(rows)


def judge(rows: list[Row]) -> bool:
    """Print each goal with the figure measured at B = 512 and one decoder."""
    at_512 = {
        (row["op"], row["provider"]): row
        for row in rows
        if row["batch"] == 512 and row["decoders"] == 1
    }

    def ratio(op: str, slow: str, fast: str) -> float:
        return at_512[op, slow]["median_ms"] / at_512[op, fast]["median_ms"]

    packed = at_512["masked_mse", "triton packed"]
    modelled = [row for row in at_512.values() if row["model_ms"]]
    worst = max(abs(row["median_ms"] / row["model_ms"] - 1) for row in modelled)
    goals = [
        ("masked_mse, % of copy bandwidth", packed["percent_of_copy"], 90.0),
        ("masked_mse, x eager", ratio("masked_mse", "eager", "triton packed"), 12.0),
        ("masked_mse, x compile", ratio("masked_mse", "torch.compile", "triton packed"), 2.2),
        *(
            (f"{op}, x eager", ratio(op, "eager", "triton"), 10.0)
            for op in ("decoder_assemble", "decoder_assemble_pure")
        ),
    ]
    for name, value, goal in goals:
        print(f"{name:36}{value:8.2f}  goal {goal:6.2f}  {'met' if value >= goal else 'MISSED'}")
    print(f"{'byte model, worst deviation %':36}{100 * worst:8.1f}  goal  15.0 or less")
    return worst <= 0.15 and all(value >= goal for _, value, goal in goals)


def whole_step(output: Path) -> bool:
    """A DeepMIM ViT-B training step, in one process per backend."""
    rows = []
    # Twice and in turn, so that a GPU that slows down as it warms up favors neither.
    for backend in ("torch", "triton", "torch", "triton"):
        command = [sys.executable, __file__, "--step", backend]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(result.stderr, file=sys.stderr)
            return False
        row = json.loads(result.stdout.splitlines()[-1])
        print("{backend:8}{median_ms:9.2f} ms  {peak_mib:9.0f} MiB".format(**row), flush=True)
        rows.append(row)
    write_csv(rows, output / "kernel_step.csv")
    best = {
        name: min(r["median_ms"] for r in rows if r["backend"] == name)
        for name in ("torch", "triton")
    }
    gain = best["torch"] / best["triton"]
    print(f"whole step: {gain:.3f}x, goal 1.05  {'met' if gain >= 1.05 else 'MISSED'}")
    return gain >= 1.05


def training_step(preset: str, batch: int, backend: Backend) -> tuple[Step, list[Inputs]]:
    """The trainer's step in one process, with the engine and executor that a run builds.

    One micro-batch of `batch` uint8 images that lie on the device: forward and backward by the
    schedule, reduction, clipping, update. No loader, no metrics. bf16 autocast on a GPU, fp32 on a
    CPU. The step returns the sum of its losses.
    """
    from deepmim_scale.batch import Batch
    from deepmim_scale.ds_config import bundled, load_ds_config, resolve_batch, resolve_ds_config
    from deepmim_scale.objectives import build_objective
    from deepmim_scale.parallel import zero
    from deepmim_scale.plan.resolve import training_plan
    from deepmim_scale.presets import load_preset
    from deepmim_scale.train.runtime import build_runtime

    use_backend(backend)
    sizes = {"microbatch_size": batch, "microbatches": 1, "global_batch": None}
    config = load_preset(preset).replace(**sizes)
    device = zero.init_processes()
    given = load_ds_config(bundled("a100_bf16.json" if device.type == "cuda" else "cpu_fp32.json"))
    ds_config, _ = resolve_ds_config(given, config, resolve_batch(config, num_replicas=1))
    objective = build_objective(config.model)
    runtime = build_runtime(config, training_plan(config, 1), ds_config, device, objective)
    engine, executor, model = runtime.engine, runtime.executor, config.model
    torch.manual_seed(0)
    shape = (batch, model.in_chans, model.img_size, model.img_size)
    sets = []
    for _ in range(2):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        noise = torch.rand(batch, model.num_patches)
        sets.append({"batch": Batch(images, noise).to(device)})

    def step(x: Inputs) -> torch.Tensor:
        calls = executor.num_backward_calls
        with zero.reduced_step(engine, config.reduction, calls) as backward:
            losses = executor.train([x["batch"]], backward)
        zero.apply_step(engine, learning_rate=1e-4)
        return torch.stack(list(losses.values())).sum()

    return step, sets


def time_step(backend: Backend, preset: str = "deepmim_vit_b_12", batch: int = 128) -> Row:
    """The time of `training_step` and the memory of the whole process."""
    times = timed(*training_step(preset, batch, backend), steps=60)
    return {
        "backend": backend,
        "model": preset,
        "batch": batch,
        **percentiles(times),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        **environment(),
    }


STAGES = {1: correctness, 2: sweep, 3: speeds, 4: whole_step}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", type=int, choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--step", choices=get_args(Backend), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing here can run; see benchmarks/kernel_speed.py", file=sys.stderr)
        return 2
    if args.step:
        print(json.dumps(time_step(args.step)))
        return 0
    passed = [STAGES[stage](args.output) for stage in args.stage]  # all run, whatever fails
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
