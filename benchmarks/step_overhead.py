"""Counts what a training step does besides its arithmetic: operators, host waits, communicators.

One rank of ViT-B/12's structure (12 blocks, 4 decoders of 4 blocks, small widths), 4 micro-batches,
bf16 autocast, on a CPU: a GPU's step launches the same operators. Nothing is timed.

    python benchmarks/step_overhead.py --json overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from deepmim_scale.config import RunConfig
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.grid import make_group
from deepmim_scale.parallel.p2p import Channels
from deepmim_scale.plan import timing
from deepmim_scale.plan.resolve import training_plan
from deepmim_scale.presets import load_preset
from deepmim_scale.train.prepare import prepare
from deepmim_scale.train.trainer import Trainer

MICROBATCHES, WARMUP_STEPS, RANKS, STAGES = 4, 2, 512, 8
# Room and views: no kernel runs for them.
NO_KERNEL = {
    "aten.alias.default",
    "aten.detach.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_strided.default",
    "aten.lift_fresh.default",
    "aten.new_empty.default",
    "aten._unsafe_view.default",
}


class OperatorCount(TorchDispatchMode):
    """Counts operators that run a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one and run it."""
        if not func.is_view and str(func) not in NO_KERNEL:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operators so far."""
        return sum(self.found.values())


@contextlib.contextmanager
def counted_waits(waits: Counter[str]) -> Iterator[None]:
    """Count what makes the host wait for a device: reading a tensor, or copying to make one.

    Of this thread alone: the loader's threads work on host memory, beside the steps.
    """
    main = threading.get_ident()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Without a device torch.tensor stays on the host and waits for nobody.
            reads = name != "tensor" or kwargs.get("device") is not None
            if reads and threading.get_ident() == main:
                waits[name] += 1
            return function(*args, **kwargs)

        return call

    methods = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__")
    with contextlib.ExitStack() as stack:
        for name in methods:
            wrapped = counting(name, getattr(Tensor, name))
            stack.enter_context(mock.patch.object(Tensor, name, wrapped))
        stack.enter_context(mock.patch.object(torch, "tensor", counting("tensor", torch.tensor)))
        yield


def small_run(folder: Path) -> RunConfig:
    """The run that is counted: images, widths and batches as small as they can be."""
    (folder / "data" / "train" / "a").mkdir(parents=True)
    for number in range(64):
        pixels = np.full((32, 32, 3), number, np.uint8)
        Image.fromarray(pixels).save(folder / "data" / "train" / "a" / f"{number:02}.png")
    preset = load_preset("deepmim_vit_b_12")
    model = preset.model.replace(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_num_heads=2,
    )
    return preset.replace(
        model=model,
        microbatch_size=2,
        global_batch=2 * MICROBATCHES,
        steps=WARMUP_STEPS + 3,  # after the last one a row is due
        data=str(folder / "data"),
        output=str(folder / "run"),
        deepspeed_config=str(Path(__file__).parents[1] / "ds_configs" / "a100_bf16.json"),
        log_every=1000,
        print_every=1000,
        save_every=0,
        kernels="torch",
    )


def count_step(config: RunConfig) -> dict[str, Any]:
    """Operators and host waits of one step, after a few that warm up."""
    # As many pieces of gradients as ViT-B has at its own widths.
    with mock.patch.object(timing, "PIECE_PARAMETERS", 1):
        trainer = Trainer(prepare(config), zero.init_processes(config.timeout))
    batches = iter(trainer.build_loader())
    for _ in range(WARMUP_STEPS):
        trainer.train_step(next(batches), 0.0)
    after: list[int] = []
    operators, run_backward = OperatorCount(), Tensor.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        run_backward(*args, **kwargs)
        after.append(operators.total)

    with operators, mock.patch.object(Tensor, "backward", backward):
        trainer.train_step(next(batches), 0.0)
    waits: Counter[str] = Counter()
    with counted_waits(waits):
        trainer.train_step(next(batches), 0.0)
    dist.destroy_process_group()
    return {
        "operators_per_step": operators.total,
        "operators_after_backward": operators.total - after[-1],
        "host_waits_per_step": sum(waits.values()),
        "host_waits": dict(waits),
        "commonest": operators.found.most_common(12),
    }


def communicator_collectives() -> int:
    """Collectives in which a rank makes groups, as the first of 512 in a pipeline of 8 stages.

    torch's fake process group stands for the other ranks; DeepSpeed's own groups are counted too.
    """
    made = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            return function(*args, **kwargs)

        return call

    config = load_preset("deepmim_vit_b_48").replace(stages=STAGES)
    schedule = training_plan(config, STAGES).built.schedule
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    module = torch.nn.Linear(64, 64)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    with (
        mock.patch.object(dist, "new_group", counting(dist.new_group)),
        mock.patch.object(dist, "split_group", counting(dist.split_group)),
    ):
        grid = zero.build_grid(STAGES)
        optimizer = torch.optim.AdamW(module.parameters())
        zero.build_engine(module, optimizer, settings, grid)
        Channels(schedule, grid.pipe_groups, torch.device("cpu"), 60.0)
        make_group(grid.pipe_groups)  # the loader's
    dist.destroy_process_group()
    return made


def main() -> None:
    """Print the counts; write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = count_step(small_run(Path(folder)))
    counts["communicator_collectives_512"] = communicator_collectives()
    for key, value in counts.items():
        print(f"{key}: {value}")
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
