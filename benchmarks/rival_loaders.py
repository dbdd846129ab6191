"""What others load images with: each a function of a Job that gives one epoch's counts.

All decode, crop at random (area 0.2 to 1), resize bicubic to 224 and mirror, at the settings that
their users take.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIZE, BATCH = 224, 50
Epoch = Callable[[], Iterator[int]]


class Job(NamedTuple):
    """What one loader is measured on."""

    data: Path
    """Class folders of JPEGs."""
    work: Path
    """A folder for copies in other forms."""
    cores: int


def _files(data: Path) -> list[str]:
    return sorted(str(path) for path in data.rglob("*.jpg"))


def _transforms(v2: bool, on_tensors: bool) -> Any:
    """RandomResizedCrop, mirror and normalization: torchvision's first or second version."""
    import torch
    from torchvision.transforms import InterpolationMode

    from deepmim_scale.images import IMAGENET_MEAN, IMAGENET_STD

    if v2:
        from torchvision.transforms import v2 as transforms

        to_float = [transforms.ToDtype(torch.float32, scale=True)]
        to_float = to_float if on_tensors else [transforms.ToImage(), *to_float]
    else:
        from torchvision import transforms

        to_float = [transforms.ToTensor()]
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            *to_float,
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _image_folder(job: Job, **options: Any) -> Epoch:
    from torch.utils.data import DataLoader
    from torchvision import datasets

    loader = DataLoader(
        datasets.ImageFolder(str(job.data), **options),
        BATCH,
        shuffle=True,
        num_workers=job.cores,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: (len(images) for images, _ in loader)


def torchvision_loader(job: Job) -> Epoch:
    """ImageFolder (PIL) and DataLoader with one worker per core: the official code's way."""
    return _image_folder(job, transform=_transforms(v2=False, on_tensors=False))


def torchvision_v2(job: Job) -> Epoch:
    """The same with torchvision's own JPEG decoder and transforms on uint8 tensors."""
    from torchvision.io import ImageReadMode, decode_image

    def load(path: str) -> Any:
        return decode_image(path, ImageReadMode.RGB)

    transform = _transforms(v2=True, on_tensors=True)
    return _image_folder(job, loader=load, transform=transform)


def torchcodec_loader(job: Job) -> Epoch:
    """The same with torchcodec's JPEG decoder."""
    import torch
    from torchcodec.decoders import decode_jpeg

    def load(path: str) -> Any:
        return decode_jpeg(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8))

    transform = _transforms(v2=True, on_tensors=True)
    return _image_folder(job, loader=load, transform=transform)


def timm_loader(job: Job) -> Epoch:
    """timm's loader: uint8 between processes, normalized in the main one."""
    import torch
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(job.data)),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        scale=(0.2, 1.0),
        interpolation="bicubic",
        num_workers=job.cores,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    return lambda: (len(images) for images, _ in loader)


def webdataset_loader(job: Job) -> Epoch:
    """WebDataset's shards, one per worker, shuffled within a buffer; PIL and torchvision."""
    import webdataset

    shards, files = job.work / "webdataset", _files(job.data)
    if not shards.exists():
        shards.mkdir()
        for number in range(job.cores):
            with webdataset.TarWriter(str(shards / f"{number:03}.tar")) as writer:
                for i, file in enumerate(files[number :: job.cores]):
                    image = Path(file).read_bytes()
                    writer.write({"__key__": f"{i:06}", "jpg": image, "cls": 0})
    transform = _transforms(v2=False, on_tensors=False)
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, lambda label: label)
        .batched(BATCH, partial=True)
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=job.cores, persistent_workers=True
    )
    return lambda: (len(images) for images, _ in loader)


def spdl_loader(job: Job) -> Epoch:
    """SPDL's pipeline of threads with torchvision's JPEG decoder (its own needs FFmpeg)."""
    import torch
    from spdl.pipeline import PipelineBuilder
    from torchvision.io import ImageReadMode, decode_image

    files, transform = _files(job.data), _transforms(v2=True, on_tensors=True)

    def load(path: str) -> Any:
        return transform(decode_image(path, ImageReadMode.RGB))

    def epoch() -> Iterator[int]:
        pipeline = (
            PipelineBuilder()
            .add_source(random.sample(files, len(files)))
            .pipe(load, concurrency=job.cores)
            .aggregate(BATCH, drop_last=True)
            .pipe(torch.stack)
            .add_sink(2)
            .build(num_threads=job.cores)
        )
        with pipeline.auto_stop():
            yield from map(len, pipeline)

    return epoch


RIVALS: dict[str, tuple[Callable[[Job], Epoch], str]] = {
    "torchvision": (torchvision_loader, ""),
    "torchvision-v2": (torchvision_v2, ""),
    "torchcodec": (torchcodec_loader, "torchcodec"),
    "timm": (timm_loader, ""),
    "webdataset": (webdataset_loader, "webdataset"),
    "spdl": (spdl_loader, "spdl"),
}
"""Name -> loader and the module that it needs beside the project's own."""
