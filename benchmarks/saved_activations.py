"""Bytes that autograd keeps for the backward pass: joint against local decoder backward.

Counts every tensor that is saved while one ViT-B/12 step with 4 decoders of 4 blocks runs on the
CPU in fp32, shared storages once and parameters not at all. Usage:
python benchmarks/saved_activations.py [--batch 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from deepmim_scale.models import Model, build_model, local_backward
from deepmim_scale.presets import deepmim_vit_b_12


class _Held:
    """A saved tensor; autograd drops this object when it no longer needs the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_saved_bytes(model: Model, step: Callable[[], object]) -> int:
    """Largest sum of bytes of storages that autograd held at once during `step`."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    users: Counter[int] = Counter()
    current = peak = 0

    def drop(storage: int, size: int) -> None:
        nonlocal current
        users[storage] -= 1
        if not users[storage]:
            current -= size

    def pack(tensor: Tensor) -> _Held:
        nonlocal current, peak
        held, storage = _Held(tensor), tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in parameters:
            users[pointer] += 1
            if users[pointer] == 1:
                current += size
                peak = max(peak, current)
            weakref.finalize(held, drop, pointer, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        step()
    return peak


def measure(batch: int, masked_query: bool) -> dict[str, float]:
    """Peak saved MB per image of joint and local backward, and their ratio."""
    config = deepmim_vit_b_12().model.replace(masked_query=masked_query)
    model = build_model(config)
    inputs = {
        "images": torch.randn(batch, 3, config.img_size, config.img_size),
        "noise": torch.rand(batch, config.num_patches),
    }
    joint = peak_saved_bytes(model, lambda: model(**inputs).loss.backward())
    model.zero_grad(set_to_none=True)
    local = peak_saved_bytes(model, lambda: local_backward(model, **inputs))
    return {
        "masked_query": masked_query,
        "joint_mb_per_image": joint / batch / 1e6,
        "local_mb_per_image": local / batch / 1e6,
        "ratio": joint / local,
    }


def main() -> None:
    """Print both cases as a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = [measure(arguments.batch, masked_query) for masked_query in (False, True)]
    print(
        f"ViT-B/12, 4 decoders x 4 blocks, batch {arguments.batch}, fp32, "
        f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    )
    print("| masked-query last block | joint MB/image | local MB/image | joint / local |")
    print("|---|---|---|---|")
    for row in rows:
        name = "on" if row["masked_query"] else "off"
        print(
            f"| {name} | {row['joint_mb_per_image']:.1f} | {row['local_mb_per_image']:.1f} "
            f"| {row['ratio']:.2f} |"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
