"""Carries a run from one number of stages and replicas to the next; started by test_reshard.py.

Usage: python reshard.py FOLDER CHAINS.json. A chain is a list of legs, each in fresh processes:
load the last leg's checkpoint, take a step, save, take another one. Legs leave NAME.safetensors
with everything that the optimizer works on at each of these moments.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx  # DeepSpeed needs it: imported once, before the legs are forked
import torch.distributed as dist
from free_port import free_port
from optimizer_state import optimizer_state
from pipelines import LEARNING_RATE, Pipeline, micro_batch
from safetensors.torch import save_file
from torch import Tensor

from deepmim_scale.checkpoint.saver import Saver
from deepmim_scale.objectives import build_objective
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.runs.state import CheckpointState

MICROBATCHES = 4  # of a step, over all replicas


def take_step(pipeline: Pipeline, number: int) -> None:
    """The same images, whatever the number of replicas is."""
    first = pipeline.replica * pipeline.microbatches
    model = pipeline.config.model
    batches = [micro_batch(number, first + m, 0, model) for m in range(pipeline.microbatches)]
    calls = pipeline.executor.num_backward_calls
    with zero.reduced_step(pipeline.engine, pipeline.config.reduction, calls) as backward:
        pipeline.executor.train(batches, backward)
    zero.apply_step(pipeline.engine, LEARNING_RATE)


def everything(pipeline: Pipeline) -> dict[str, Tensor]:
    """Weights, fp32 masters, both moments and step counts of all stages, on every rank."""
    engine = pipeline.engine
    weights = {n: p for n, p in pipeline.whole().items() if "pos_embed" not in n}
    mine = optimizer_state(engine)
    mine |= {f"master/{n}": value for n, value in zero_state.master_weights(engine).items()}
    counts = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    mine["step"] = torch.tensor([min(counts), max(counts)])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    steps = torch.stack([part.pop("step") for part in everyone])
    whole = {f"weight/{name}": value for name, value in weights.items()}
    for part in everyone:
        whole |= part
    return whole | {"step": torch.stack([steps.min(), steps.max()])}


def run_leg(folder: Path, number: int, case: dict[str, Any], rank: int, port: int) -> None:
    world = case["stages"] * case["replicas"]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    zero.init_processes(timeout_seconds=300)
    case = case | {"microbatches": MICROBATCHES // case["replicas"]}
    checkpoint = folder / "checkpoints" / f"step_{number:08d}" if number else None
    pipeline = Pipeline(case, checkpoint)
    moments = {"loaded": everything(pipeline)} if checkpoint else {}
    take_step(pipeline, number)
    moments["saved"] = everything(pipeline)
    done = number + 1
    state = CheckpointState(
        step=done,
        updates=done,
        total_steps=done,
        global_batch=MICROBATCHES,
        manifest_sha="",
        precision="fp32",
        num_stages=case["stages"],
    )
    objective = build_objective(pipeline.config.model)
    saver = Saver(str(folder), pipeline.engine, objective, pipeline.grid, keep=9)
    saver.save(state)
    take_step(pipeline, done)  # while the checkpoint is being written
    saver.wait()
    moments["next"] = everything(pipeline)
    if rank == 0:
        for name, tensors in moments.items():
            copies = {key: value.clone() for key, value in tensors.items()}
            save_file(copies, folder / f"{number}_{name}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    folder, chains = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    fresh = get_context("fork")  # what was imported is shared
    for name, chain in chains.items():
        (folder / name).mkdir()
        for number, case in enumerate(chain):
            port = free_port()
            ranks = range(case["stages"] * case["replicas"])
            legs = [
                fresh.Process(target=run_leg, args=(folder / name, number, case, rank, port))
                for rank in ranks
            ]
            for leg in legs:
                leg.start()
            for leg in legs:
                leg.join()
            if any(leg.exitcode for leg in legs):
                sys.exit(f"{name}, leg {number}: exit codes {[leg.exitcode for leg in legs]}")


if __name__ == "__main__":
    main()
