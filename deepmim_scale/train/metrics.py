"""What is measured at every step, and where it is written."""

from __future__ import annotations

import json
import math
import resource
import threading
from pathlib import Path
from typing import Any

import torch

from deepmim_scale.config import ModelConfig
from deepmim_scale.operation import Operation
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.plan.hardware import Gpu, gpu_named, mfu
from deepmim_scale.runs.folder import METRICS, read_metrics, writing
from deepmim_scale.train.loggers import Loggers


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far, GiB: of the CUDA allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def known_gpu(device: torch.device) -> Gpu | None:
    """The planner's entry for a CUDA device, by its name; None where it has none."""
    return gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def throughput(
    config: ModelConfig, images: int, seconds: float, num_processes: int, device: torch.device
) -> dict[str, float]:
    """Rates of one step: images/s, images/s/GPU, TFLOP/s and MFU per process (no MFU on a CPU).

    FLOPs are those of the full model's forward and backward; recomputation and a frozen teacher do
    not count.
    """
    flops = model_cost(config).whole.training_flops
    return flop_rates(flops, images, seconds, num_processes, device)


def flop_rates(
    flops: int, images: int, seconds: float, num_processes: int, device: torch.device
) -> dict[str, float]:
    """Rates of one step of a model of so many FLOPs per image, forward and backward."""
    rate = images / seconds
    row = {
        "images_per_second": rate,
        "images_per_second_per_gpu": rate / num_processes,
        "tflops_per_gpu": flops * rate / num_processes / 1e12,
    }
    gpu = known_gpu(device)
    if gpu is not None:
        row["mfu"] = mfu(flops, rate / num_processes, gpu)
    return row


def _without_nan(value: Any) -> Any:
    """JSON knows neither NaN nor Infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_unless_told_here(error: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread keeps its error, and the next row raises it in ours.
    if type(error.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(error)


class MetricsWriter:
    """metrics.jsonl, a row per step, and loggers beside it; rows after `step` are dropped."""

    def __init__(self, config: Operation, run: str, step: int) -> None:
        self._run, self._path = run, Path(run) / METRICS
        path = self._path
        kept = [row for row in read_metrics(run) if row["step"] <= step] if path.exists() else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.rename(path)
        self._lines = path.open("a")
        threading.excepthook = _print_unless_told_here
        self._loggers = Loggers(config.log_to, run, step, config.model_dump(mode="json"))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers inside dicts get names such as losses/block06 at loggers.

        RunFailure if the disk is full or the folder is gone.
        """
        with writing(self._run):
            # Writing into a deleted file would succeed, and be lost.
            self._path.stat()
            self._lines.write(json.dumps(_without_nan(row), allow_nan=False) + "\n")
            self._lines.flush()
            self._loggers.write(row)

    def close(self) -> None:
        """Flush all."""
        with writing(self._run):
            self._lines.close()
            self._loggers.close()
