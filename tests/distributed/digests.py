"""Started by torchrun: flips single bits of a training run and tells which were found.

argv: flips of each kind, file for the answer.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipelines import LEARNING_RATE, Pipeline, micro_batch

from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.digests import Digests
from deepmim_scale.train.inject import flip_bit

EVERY = 3
KINDS = ("weights", "masters", "moments")


def take_step(pipeline: Pipeline, number: int) -> bool:
    """One step; whether any rank has raised an alarm."""
    model, replica = pipeline.config.model, pipeline.replica
    batches = [micro_batch(number % 3, m, replica, model) for m in range(pipeline.microbatches)]
    calls = pipeline.executor.num_backward_calls
    with zero.reduced_step(pipeline.engine, pipeline.config.reduction, calls) as backward:
        pipeline.executor.train(batches, backward)
    zero.apply_step(pipeline.engine, LEARNING_RATE)
    return pipeline.engine.gradients.agreed.alarm


def tensors_of(pipeline: Pipeline, kind: str) -> list[torch.Tensor]:
    if kind == "weights":
        return zero_state.flat_weights(pipeline.engine)
    rows = list(zero_state.shards(pipeline.engine))
    return [row[0] for row in rows] if kind == "masters" else [r for row in rows for r in row[1:]]


def main() -> None:
    flips, answer = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    zero.init_processes(300.0)
    case: dict[str, Any] = {"method": "mae", "stages": 1, "replicas": 2, "microbatches": 1}
    pipeline, draw = Pipeline(case), random.Random(0)
    take_step(pipeline, 0)
    digests = Digests(pipeline.engine, EVERY, 1)
    pipeline.engine.gradients.guard = digests
    result: dict[str, Any] = {"false": sum(take_step(pipeline, n) for n in range(2 * EVERY))}
    result["update"] = check_updates(pipeline, digests)
    for kind in KINDS:
        found = named = 0
        for number in range(flips):
            rank, bit = draw.randrange(dist.get_world_size()), draw.getrandbits(60)
            state = [t for name in KINDS for t in tensors_of(pipeline, name)]
            before = [tensor.clone() for tensor in state]
            if dist.get_rank() == rank:
                flip_bit(tensors_of(pipeline, kind), bit)
            found += take_step(pipeline, number)
            (what,) = digests.found() or [""]
            named += what.startswith(f"rank {rank} on ") and "changed between two updates" in what
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)  # a flipped exponent would end all learning
            digests.after_update()
        result[kind] = [found, named]
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def check_updates(pipeline: Pipeline, digests: Digests) -> list[str]:
    """Rank 1 computes its updates with another gradient than its neighbor was told."""

    def spoil(optimizer: Any, *_: Any) -> None:
        if dist.get_rank() == 1:
            optimizer.param_groups[0]["params"][0].grad *= 1.5

    # After the guard's own.
    hook = pipeline.engine.optimizer.optimizer.register_step_pre_hook(spoil)
    assert any(take_step(pipeline, n) for n in range(EVERY + 1)), "told one step later"
    found = digests.found()
    hook.remove()
    digests._update.zero_()
    return found


if __name__ == "__main__":
    main()
