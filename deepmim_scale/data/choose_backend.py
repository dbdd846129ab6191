"""Which backend decodes a run's images: DALI on a GPU, else CPU threads with torch's decoders."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch

from deepmim_scale.config import RunConfig
from deepmim_scale.data import jpeg_region, torch_backend
from deepmim_scale.data.backend import Backend
from deepmim_scale.data.source import Source
from deepmim_scale.data.threads import num_decoding_threads
from deepmim_scale.errors import UserError
from deepmim_scale.settings import pluralize

Loader = Literal["auto", "torch", "dali"]
Decode = Literal["auto", "exact", "cpu", "fast", "mixed"]


def choose_loader(
    loader: Loader,
    decode: Decode,
    device: torch.device,
) -> tuple[str, str, str]:
    """Loader (`torch` or `dali`), decoder (`cpu`, `fast` or `mixed`), and one line that says why.

    Raises UserError if DALI is asked for but not installed, or for `fast`, or `mixed` without DALI
    and a GPU.
    """
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if loader == "dali" and not has_dali:
        raise UserError(
            "loader=dali: NVIDIA DALI is not installed; pip install nvidia-dali-cuda120 "
            "(nvidia-dali-cuda130 for CUDA 13) or use --loader torch"
        )
    on_gpu = device.type == "cuda"
    chosen = ("dali" if has_dali and on_gpu else "torch") if loader == "auto" else loader
    if decode == "fast":
        if loader == "dali":
            raise UserError("decode=fast: DALI cannot decode at a fraction; use --loader torch")
        if not jpeg_region.is_available():
            raise UserError(
                "decode=fast: needs a C compiler and libjpeg-turbo's headers (Debian: "
                "libjpeg-turbo8-dev or libjpeg62-turbo-dev, Conda: libjpeg-turbo); install them "
                "or use --decode exact"
            )
        return "torch", "fast", "loader torch (decode fast): JPEG at a fraction on CPU threads"
    if decode == "mixed" and not (chosen == "dali" and on_gpu):
        raise UserError(f"decode=mixed: needs --loader dali and a GPU, got {chosen} on {device}")
    if chosen == "torch":
        missing = "DALI is not installed" if on_gpu else "no GPU"
        why = missing if loader == "auto" else "asked for"
        regions = "libjpeg-turbo, regions only," if jpeg_region.is_available() else ""
        decoder = regions or torch_backend.jpeg_decoder()[0]
        return "torch", "cpu", f"loader torch ({why}): JPEG by {decoder} on CPU threads"
    where = "mixed" if decode == "mixed" else "cpu"
    if decode == "auto":
        # A100 and later decode JPEG in hardware; on V100 nvJPEG would compete with training.
        where = "mixed" if on_gpu and torch.cuda.get_device_capability(device) >= (8, 0) else "cpu"
    why = "a GPU, and DALI is installed" if loader == "auto" else "asked for"
    resize = "GPU" if on_gpu else "CPU"
    return "dali", where, f"loader dali ({why}): decode {where}, resize on the {resize}"


def build_backend(
    config: RunConfig,
    source: Source,
    batch: int,
    device: torch.device,
    loader: Loader = "auto",
    decode: Decode = "auto",
    prefetch: int = 2,
) -> tuple[Backend, str]:
    """The run's backend and the line that says why it was chosen; `batch` is B.

    `prefetch` micro-batches are in work at once.
    """
    image, threads = config.model.image_format, num_decoding_threads(config)
    if image.is_rgb:
        chosen, where, line = choose_loader(loader, decode, device)
    else:  # which threads alone decode
        chosen, where, line = "torch", "cpu", f"loader torch: {image.kind} on CPU threads"
    if chosen == "torch":
        stream = functools.partial(
            torch_backend.stream,
            read_image=torch_backend.image_reader(source, image, where == "fast"),
            image=image,
            threads=threads,
            prefetch=prefetch,
            pinned=device.type == "cuda",
        )
        return stream, f"{line}, {pluralize(threads, 'thread')}"
    from deepmim_scale.data import dali

    stream = functools.partial(
        dali.stream,
        source=source,
        size=image.size,
        threads=threads,
        max_batch=batch,
        decode=where,
        device=device,
        prefetch=prefetch,
    )
    return stream, line
