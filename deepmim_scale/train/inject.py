"""Strikes the faults that `--inject` asks for, so that a cluster's answer to them can be seen."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.checkpoint import files
from deepmim_scale.faults import KINDS, Fault, parse_fault
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.runs.folder import list_checkpoints
from deepmim_scale.runs.stop import print_line


class Injector:
    """The faults of this rank."""

    def __init__(self, faults: Sequence[str], output: str, engine: zero.Engine) -> None:
        found = [parse_fault(text) for text in faults]
        self._mine = [fault for fault in found if fault.rank == dist.get_rank()]
        self._output, self._engine = output, engine

    def strike(self, step: int) -> None:
        """Do what is due right before a step, numbered from 1."""
        for fault in self._mine:
            lasts = fault.kind in ("slow", "enospc")
            if fault.step == step:
                print_line(f"injected before step {step}: {KINDS[fault.kind]}, rank {fault.rank}")
            if fault.step == step or (lasts and fault.step < step):
                _STRIKES[fault.kind](fault, self._output, self._engine)


def _kill(fault: Fault, output: str, engine: zero.Engine) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(fault: Fault, output: str, engine: zero.Engine) -> None:
    while True:
        time.sleep(60)


def _slow(fault: Fault, output: str, engine: zero.Engine) -> None:
    time.sleep(fault.seconds)


def _make_nan(fault: Fault, output: str, engine: zero.Engine) -> None:
    parameter = next(p for p in engine.module.parameters() if p.requires_grad)

    def spoil(gradient: Tensor) -> Tensor:
        hook.remove()
        return torch.full_like(gradient, math.nan)

    hook = parameter.register_hook(spoil)


def _flip(fault: Fault, output: str, engine: zero.Engine) -> None:
    if fault.of == "checkpoint":
        newest = list_checkpoints(output)[-1:]
        names = sorted(newest[0].glob("*.safetensors")) if newest else []
        flip_file(names[0], fault.bit)
        return
    tensors = zero_state.flat_weights(engine)
    if fault.of == "moments":
        tensors = [row for rows in zero_state.shards(engine) for row in rows[1:]]
    flip_bit(tensors, fault.bit)


def flip_bit(tensors: Sequence[Tensor], bit: int) -> None:
    """Change one bit of flat tensors; `bit` counts over all of them, modulo their number."""
    sizes = [8 * tensor.nbytes for tensor in tensors]
    bit %= sum(sizes)
    for tensor, size in zip(tensors, sizes, strict=True):
        if bit < size:
            tensor.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            return
        bit -= size


def flip_file(path: Path, bit: int) -> None:
    """Change one bit of a file, counted modulo their number."""
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _fill(fault: Fault, output: str, engine: zero.Engine) -> None:
    files.disk_is_full = True


_STRIKES: dict[str, Callable[[Fault, str, zero.Engine], None]] = {
    "kill": _kill,
    "hang": _hang,
    "slow": _slow,
    "nan": _make_nan,
    "bitflip": _flip,
    "enospc": _fill,
}
