"""Images/s and CPU time per image of every loader on the same files, interleaved, equal cores.

Each measurement is a process of its own on `--cores` cores (its threads or workers number the
same), with one warm-up epoch; the rounds go through all loaders in turn, so that a change of the
machine's load meets all. All loaders decode, crop at random (area 0.2 to 1), resize bicubic with
antialiasing to 224 and mirror; `uint8` and `float` say what they hand over (float: normalized).

    python benchmarks/loader_speed.py --cores 2 --rounds 5 --json loader_speed.json
    python benchmarks/loader_speed.py --training quickstart    # wait share inside training
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

SIZE, BATCH, EPOCHS = 224, 50, 3


def torch_backend(data: Path, cores: int) -> Callable[[], Iterator[int]]:
    """Our CPU default: threads in this process."""
    return _ours(data, cores, "torch", False)


def torch_backend_float(data: Path, cores: int) -> Callable[[], Iterator[int]]:
    """The same with normalization to float32, which kernels do for us."""
    return _ours(data, cores, "torch", True)


def dali_cpu(data: Path, cores: int) -> Callable[[], Iterator[int]]:
    """DALI, CPU pipeline, driven by the sample plan."""
    return _ours(data, cores, "dali", False)


def dali_mixed(data: Path, cores: int) -> Callable[[], Iterator[int]]:
    """DALI decoding on the GPU; uint8 on the GPU."""
    return _ours(data, cores, "dali", False, "cuda")


def _ours(
    data: Path, cores: int, loader: Literal["torch", "dali"], normalized: bool, device: str = "cpu"
) -> Callable[[], Iterator[int]]:
    import torch

    from deepmim_scale.config import RunConfig
    from deepmim_scale.data.choose_backend import build_backend
    from deepmim_scale.data.folder_source import open_folder
    from deepmim_scale.data.sample_plan import SamplePlan
    from deepmim_scale.data.step_loader import Share, Span, build_step_loader
    from deepmim_scale.images import normalize

    config = RunConfig(loader_threads=cores)
    source = open_folder(data)
    plan = SamplePlan(len(source), 0, BATCH)

    def epoch() -> Iterator[int]:
        backend, _ = build_backend(
            config,
            source,
            BATCH,
            torch.device(device),
            loader,
            "mixed" if device == "cuda" else "cpu",
        )
        step_loader = build_step_loader(
            config,
            source,
            plan,
            Share(),
            Span(0, plan.steps_per_epoch),
            backend=backend,
            device=torch.device(device),
        )
        for (batch,) in step_loader:
            images = normalize(batch.images) if normalized else batch.images
            yield len(images)

    return epoch


def torchvision_loader(data: Path, cores: int) -> Callable[[], Iterator[int]]:
    """ImageFolder (PIL) and DataLoader with one worker per core: the official code's way."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from deepmim_scale.images import IMAGENET_MEAN, IMAGENET_STD

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(str(data), transform),
        BATCH,
        shuffle=True,
        num_workers=cores,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: (len(images) for images, _ in loader)


def timm_loader(data: Path, cores: int) -> Callable[[], Iterator[int]]:
    """timm's loader: uint8 between processes, normalized in the main one."""
    import torch
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(data)),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        scale=(0.2, 1.0),
        interpolation="bicubic",
        num_workers=cores,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    return lambda: (len(images) for images, _ in loader)


LOADERS = {
    "torch": torch_backend,
    "torch-float": torch_backend_float,
    "dali-cpu": dali_cpu,
    "dali-mixed": dali_mixed,
    "torchvision": torchvision_loader,
    "timm": timm_loader,
}
HANDS_OVER = {"torchvision": "float", "timm": "float", "torch-float": "float"}


def measure(name: str, data: Path, cores: int) -> dict[str, float]:
    """Images/s and CPU ms per image over EPOCHS epochs after a warm one."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch

    torch.set_num_threads(1)
    epoch = LOADERS[name](data, cores)
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


def write_photos(folder: Path, count: int = 300) -> None:
    """JPEGs of 500 x 375, quality 92, cut from scikit-image's free photographs."""
    import numpy as np
    import skimage.data
    from PIL import Image

    generator = np.random.default_rng(0)
    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
    for i in range(count):
        name = names[i % len(names)]
        photo = Image.fromarray(getattr(skimage.data, name)())
        side = generator.uniform(0.5, 1.0)
        height = int(min(photo.height, photo.width * 0.75) * side)
        width = height * 4 // 3
        top = int(generator.integers(0, photo.height - height + 1))
        left = int(generator.integers(0, photo.width - width + 1))
        region = photo.crop((left, top, left + width, top + height)).resize((500, 375))
        (folder / name).mkdir(parents=True, exist_ok=True)
        region.save(folder / name / f"{i:03}.jpg", quality=92)


def compare(arguments: argparse.Namespace) -> None:
    """Run all loaders in turn and print a table of medians."""
    import torch

    names = arguments.loaders or [
        name for name in LOADERS if name != "dali-mixed" or torch.cuda.is_available()
    ]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(arguments.data or temporary)
        if not arguments.data:
            write_photos(data)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                command = [sys.executable, __file__, "--measure", name, "--data", str(data)]
                command += ["--cores", str(arguments.cores)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                output = subprocess.check_output(command, env=environment, text=True)
                results[name].append(json.loads(output.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    print(
        f"{arguments.cores} cores, {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f}, "
        f"torch {version('torch')}, torchvision {version('torchvision')}"
    )
    print("loader       hands over   img/s    slowest..fastest  CPU ms/img  / torchvision")
    print("(medians; the ratio is the median of the rounds' ratios)")
    for name, row in medians.items():
        speeds = [entry["images_per_second"] for entry in results[name]]
        row |= {"slowest": min(speeds), "fastest": max(speeds)}
        line = "{:12} {:10} {images_per_second:7.1f} {slowest:10.1f}..{fastest:<8.1f} {cpu_ms:8.2f}"
        line = line.format(name, HANDS_OVER.get(name, "uint8"), **row)
        if base := results.get("torchvision"):
            pairs = zip(speeds, base, strict=True)
            ratio = statistics.median(mine / theirs["images_per_second"] for mine, theirs in pairs)
            line += f"  {ratio:11.2f}"
        print(line)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(medians, indent=1) + "\n", encoding="utf-8")


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
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loaders", nargs="*", choices=LOADERS, help="default: all that can run")
    parser.add_argument("--json", default="", help="write the table here")
    parser.add_argument("--training", metavar="PRESET", help="measure the wait inside training")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, Path(arguments.data), arguments.cores)))
    elif arguments.training:
        training(arguments.training, arguments.data, arguments.cores)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
