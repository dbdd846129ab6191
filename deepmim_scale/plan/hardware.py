"""GPUs and networks that the planner knows (vendors' data sheets; rates without sparsity)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from deepmim_scale.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    peak_tflops: float
    """Dense 16-bit tensor-core rate, TFLOP/s."""
    memory_gib: float
    utilization: float
    """Share of the peak that large micro-batches reach (assumed until measured)."""
    intra_gbytes: float
    """Bandwidth per direction between GPUs of a node, GB/s."""


GPUS: dict[str, Gpu] = {
    "v100-16g": Gpu(125.0, 16, 0.38, 150),
    "v100-32g": Gpu(125.0, 32, 0.38, 150),
    "a100-40g": Gpu(312.0, 40, 0.40, 300),
    "a100-80g": Gpu(312.0, 80, 0.40, 300),
    "h100-80g": Gpu(989.4, 80, 0.40, 450),
    "h200-141g": Gpu(989.4, 141, 0.40, 450),
}

# Drivers' names, whole, of what has the peak of an entry above; other boards differ (PCIe cards of
# V100 and H100, NVL), and so do slices of a GPU (MIG).
DEVICE_NAMES = {
    r"Tesla V100-SXM\d-\d+GB": "v100-32g",
    r"(NVIDIA )?A100(-\w+-\d+GB| 80GB PCIe)": "a100-80g",
    r"NVIDIA H100 80GB HBM3": "h100-80g",
    r"NVIDIA H200": "h200-141g",
}

NETWORKS: dict[str, float] = {
    "10gbe": 1.25,
    "25gbe": 3.125,
    "100gbe": 12.5,
    "edr": 12.5,
    "hdr": 25.0,
    "8xhdr": 200.0,
    "ndr": 50.0,
    "8xndr": 400.0,
}
"""Name to bandwidth of one node per direction, GB/s (line rate)."""


def lookup(key: str, name: str, table: Mapping[str, Value]) -> Value:
    """The entry of GPUS or NETWORKS; UserError lists the names there are."""
    if name not in table:
        raise UserError(f"{key}={name}: unknown; use one of {', '.join(table)}")
    return table[name]


def network_gbytes(text: str) -> float:
    """GB/s of one node of a name of NETWORKS, or of a number of Gbit/s; UserError for others."""
    try:
        found = float(text) / 8
    except ValueError:
        found = NETWORKS.get(text, 0.0)
    if not 0 < found < math.inf:
        raise UserError(
            f"network={text}: unknown; use one of {', '.join(NETWORKS)}, or a number of Gbit/s"
        )
    return found


def gpu_named(device_name: str) -> Gpu | None:
    """The entry with the peak of a device of this driver's name, None where there is none.

    Memory may differ: both sizes of V100 and A100 have one rate.
    """
    found = (key for name, key in DEVICE_NAMES.items() if re.fullmatch(name, device_name))
    return next((GPUS[key] for key in found), None)


def mfu(training_flops_per_image: float, images_per_second_per_gpu: float, gpu: Gpu) -> float:
    """Model FLOP utilization: share of the dense 16-bit peak that the model's own FLOPs use."""
    return training_flops_per_image * images_per_second_per_gpu / (gpu.peak_tflops * 1e12)
