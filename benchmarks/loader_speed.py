"""Images/s and CPU time per image of every loader on the same files, interleaved, equal cores.

Each measurement is a process of its own on `--cores` cores (its threads or workers number the
same), with one warm-up epoch; the rounds go through all loaders in turn, so that a change of the
machine's load meets all. `uint8` and `float` say what they hand over (float: normalized).

    python benchmarks/loader_speed.py --cores 2 --rounds 5 --json loader_speed.json
    python benchmarks/loader_speed.py --training quickstart    # wait share inside training
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from rival_loaders import BATCH, RIVALS, SIZE, Epoch, Job

EPOCHS = 3


def folder(job: Job) -> Epoch:
    """Our CPU default: threads in this process, on a folder."""
    return _ours(job.data, job)


def normalized(job: Job) -> Epoch:
    """The same with normalization to float32, which kernels do for us."""
    return _ours(job.data, job, is_normalized=True)


def whole(job: Job) -> Epoch:
    """Without the compiled file: whole images are decoded, by torchcodec or torchvision."""
    from deepmim_scale.data import jpeg_region

    jpeg_region._library = lambda: None
    return _ours(job.data, job)


def fast(job: Job) -> Epoch:
    """--decode fast."""
    return _ours(job.data, job, decode="fast")


def in_container(suffix: str) -> Callable[[Job], Epoch]:
    """The same files in one container, with its index."""
    return lambda job: _ours(job.work / f"images{suffix}", job)


def dali(job: Job) -> Epoch:
    """DALI, CPU pipeline, driven by the sample plan."""
    return _ours(job.data, job, loader="dali")


def dali_mixed(job: Job) -> Epoch:
    """DALI decoding on the GPU; uint8 on the GPU."""
    return _ours(job.data, job, loader="dali", decode="mixed", device="cuda")


def _ours(
    data: Path,
    job: Job,
    loader: Literal["torch", "dali"] = "torch",
    decode: Literal["exact", "fast", "mixed"] = "exact",
    is_normalized: bool = False,
    device: str = "cpu",
) -> Epoch:
    import torch

    from deepmim_scale.config import RunConfig
    from deepmim_scale.data import torch_backend
    from deepmim_scale.data.choose_backend import build_backend
    from deepmim_scale.data.open_source import open_source
    from deepmim_scale.data.sample_plan import SamplePlan
    from deepmim_scale.data.step_loader import Share, Span, build_step_loader
    from deepmim_scale.images import normalize

    torch_backend.CACHE_BYTES = 0  # data sets do not fit into memory
    config = RunConfig(loader_threads=job.cores)
    source = open_source(str(data), "train")
    assert source is not None, "a source raises where there is nothing to train on"
    plan = SamplePlan(len(source), 0, BATCH)

    def epoch() -> Iterator[int]:
        where = torch.device(device)
        backend, _ = build_backend(config, source, BATCH, where, loader, decode)
        span = Span(0, plan.steps_per_epoch)
        steps = build_step_loader(
            config, source, plan, Share(), span, backend=backend, device=where
        )
        for (batch,) in steps:
            images = normalize(batch.images) if is_normalized else batch.images
            yield len(images)

    return epoch


OURS: dict[str, tuple[Callable[[Job], Epoch], str]] = {
    "folder": (folder, ""),
    "tar": (in_container(".tar"), ""),
    "zip": (in_container(".zip"), ""),
    "parquet": (in_container(".parquet"), "pyarrow"),
    "whole": (whole, ""),
    "fast": (fast, ""),
    "packed": (in_container(".packed.tar"), ""),
    "float": (normalized, ""),
    "dali-cpu": (dali, "nvidia.dali"),
    "dali-mixed": (dali_mixed, "nvidia.dali"),
}
LOADERS = OURS | RIVALS
FLOATS = ("float", "torchvision", "torchvision-v2", "torchcodec", "timm", "webdataset", "spdl")


def write_containers(job: Job) -> None:
    """The images in every container, scanned, and packed."""
    path = job.work / "images"
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        tar.add(job.data, "images")
    files = sorted(file for file in job.data.rglob("*") if file.is_file())
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for file in files:
            archive.write(file, str(file.relative_to(job.data)))
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        rows = [{"bytes": f.read_bytes(), "path": str(f.relative_to(job.data))} for f in files]
        table = pyarrow.table({"image": pyarrow.array(rows, kind)})
        parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=100)
    packed = str(path.with_suffix(".packed.tar"))
    commands = [["pack", str(job.data), packed, "--threads", str(job.cores)]]
    commands += [["scan", str(path.with_suffix(end))] for end in (".tar", ".zip", ".parquet")]
    for command in commands:
        if command[0] == "pack" or Path(command[1]).exists():
            words = [sys.executable, "-m", "deepmim_scale.cli", "data", *command]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def measure(name: str, job: Job) -> dict[str, float]:
    """Images/s and CPU ms per image over EPOCHS epochs after a warm one."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    import torch

    torch.set_num_threads(1)
    epoch = LOADERS[name][0](job)
    sum(epoch())
    began, cpu_before = time.perf_counter(), _cpu_seconds()
    count = sum(sum(epoch()) for _ in range(EPOCHS))
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu_before
    return {"images_per_second": count / seconds, "cpu_ms": 1e3 * cpu / count}


def _cpu_seconds() -> float:
    """CPU time of this process and of its living workers, s."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1]
        ticks += sum(int(number) for number in fields.split()[11:13])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def write_photos(folder: Path, count: int, width: int, height: int) -> None:
    """JPEGs of quality 92, cut from scikit-image's free photographs."""
    import numpy as np
    import skimage.data
    from PIL import Image

    generator = np.random.default_rng(0)
    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
    for i in range(count):
        name = names[i % len(names)]
        photo = Image.fromarray(getattr(skimage.data, name)())
        side = generator.uniform(0.5, 1.0)
        tall = int(min(photo.height, photo.width * 0.75) * side)
        wide = tall * 4 // 3
        top = int(generator.integers(0, photo.height - tall + 1))
        left = int(generator.integers(0, photo.width - wide + 1))
        region = photo.crop((left, top, left + wide, top + tall)).resize((width, height))
        (folder / name).mkdir(parents=True, exist_ok=True)
        region.save(folder / name / f"{i:03}.jpg", quality=92)


def can_run(name: str) -> bool:
    """Whether what the loader needs is installed."""
    import torch

    module = LOADERS[name][1]
    is_there = not module or importlib.util.find_spec(module.split(".")[0]) is not None
    return is_there and (name != "dali-mixed" or torch.cuda.is_available())


def compare(arguments: argparse.Namespace) -> None:
    """Run all loaders in turn and print a table of medians."""
    names = arguments.loaders or list(LOADERS)
    left_out = [name for name in names if not can_run(name)]
    names = [name for name in names if name not in left_out]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(arguments.data or f"{temporary}/images")
        job = Job(data, Path(temporary), arguments.cores)
        if not arguments.data:
            width, height = map(int, arguments.size.split("x"))
            write_photos(data, arguments.images, width, height)
        write_containers(job)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                command = [sys.executable, __file__, "--measure", name, "--data", str(data)]
                command += ["--cores", str(arguments.cores), "--work", temporary]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                output = subprocess.check_output(command, env=environment, text=True)
                results[name].append(json.loads(output.splitlines()[-1]))
    print(
        f"{arguments.size}, {arguments.cores} cores, {arguments.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f}, torch {version('torch')}, "
        f"torchvision {version('torchvision')}; not installed: {', '.join(left_out) or 'none'}"
    )
    medians = print_table(results)
    ours = "folder" if "folder" in medians else names[0]
    print_cores(ours, medians[ours]["cpu_ms"], arguments.gpu, arguments.mfu)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(medians, indent=1) + "\n", encoding="utf-8")


def print_table(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """A row per loader; its medians."""
    print("loader         hands over   img/s    slowest..fastest   CPU ms/img  torchvision's / its")
    print("(medians; the ratios, of images/s and of CPU time, are medians of the rounds' ratios)")
    table = {}
    for name, rounds in results.items():
        row = {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
        speeds = [entry["images_per_second"] for entry in rounds]
        row |= {"slowest": min(speeds), "fastest": max(speeds)}
        line = "{:14} {:10} {images_per_second:7.1f} {slowest:10.1f}..{fastest:<8.1f} {cpu_ms:9.2f}"
        line = line.format(name, "float" if name in FLOATS else "uint8", **row)
        if base := results.get("torchvision"):
            pairs = list(zip(rounds, base, strict=True))
            speed = [a["images_per_second"] / b["images_per_second"] for a, b in pairs]
            cpu = [b["cpu_ms"] / a["cpu_ms"] for a, b in pairs]
            row |= {"speed_ratio": statistics.median(speed), "cpu_ratio": statistics.median(cpu)}
            line += "  x{speed_ratio:.2f} img/s, x{cpu_ratio:.2f} CPU".format(**row)
        print(line)
        table[name] = row
    return table


def print_cores(loader: str, cpu_ms: float, gpu: str, utilization: float) -> None:
    """How many cores a node of eight GPUs keeps busy with decoding, for each preset."""
    from deepmim_scale.plan.cost import model_cost
    from deepmim_scale.plan.hardware import GPUS, lookup
    from deepmim_scale.presets import PRESETS, load_preset

    node_flops = 8 * lookup("gpu", gpu, GPUS).peak_tflops * 1e12 * utilization
    print(f"8 x {gpu} at MFU {utilization:g}, loader {loader} at {cpu_ms:.2f} CPU ms per image:")
    for preset in PRESETS:
        config = load_preset(preset).model
        if config.img_size == SIZE:
            speed = node_flops / model_cost(config).executed.training_flops
            print(f"  {preset:24} {speed:8.0f} images/s {1e-3 * cpu_ms * speed:7.1f} cores")


def training(preset: str, data: str, cores: int) -> None:
    """Share of a training step spent waiting for images (one process, plain AdamW)."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch

    from deepmim_scale.data.open_source import open_source
    from deepmim_scale.data.sample_plan import SamplePlan
    from deepmim_scale.data.samples import write_samples
    from deepmim_scale.data.step_loader import Share, Span, build_step_loader
    from deepmim_scale.images import normalize
    from deepmim_scale.models import build_model, local_backward
    from deepmim_scale.presets import load_preset

    torch.set_num_threads(1)
    config, steps, warm = load_preset(preset), 120, 20
    with tempfile.TemporaryDirectory() as temporary:
        if not data:
            data = f"{temporary}/set"
            write_samples(data)
        source = open_source(data, "train")
        assert source is not None, "a source raises where there is nothing to train on"
        batch = config.microbatch_size
        loader = build_step_loader(
            config, source, SamplePlan(len(source), 0, batch), Share(), Span(0, steps)
        )
        model = build_model(config.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        waited = 0.0
        for step, (micro_batch,) in enumerate(loader):
            if step == warm:
                began = time.perf_counter()
            local_backward(model, normalize(micro_batch.images), noise=micro_batch.noise)
            optimizer.step()
            optimizer.zero_grad()
            waited += loader.wait_seconds if step > warm else 0.0
        seconds = time.perf_counter() - began
    print(
        f"{preset}: {(steps - warm) * batch / seconds:.0f} images/s on {cores} cores, "
        f"waiting {100 * waited / seconds:.2f} % of the time"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="class folders of images; default: written here")
    parser.add_argument("--size", default="500x375", help="width x height of those written here")
    parser.add_argument("--images", type=int, default=300, help="how many are written")
    parser.add_argument("--gpu", default="h100-80g", help="for the table of cores")
    parser.add_argument("--mfu", type=float, default=0.4, help="for the table of cores")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loaders", nargs="*", choices=LOADERS, help="default: all that can run")
    parser.add_argument("--json", default="", help="write the table here")
    parser.add_argument("--training", metavar="PRESET", help="measure the wait inside training")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        job = Job(Path(arguments.data), Path(arguments.work), arguments.cores)
        print(json.dumps(measure(arguments.measure, job)))
    elif arguments.training:
        training(arguments.training, arguments.data, arguments.cores)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
