"""What two gloo processes measure, as JSON; started once by test_two_processes.py.

Usage: deepspeed --num_accelerators 2 two_processes.py OUT.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizer_state import optimizer_state
from torch import Tensor

from deepmim_scale.config import ModelConfig
from deepmim_scale.ds_config import BatchSizes, load_ds_config, resolve_ds_config
from deepmim_scale.models import Model, build_model, local_backward
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.precision import Precision
from deepmim_scale.presets import debug
from deepmim_scale.train.optim import parameter_groups, rounded_by_autocast
from deepmim_scale.train.trainer import gradient_owner

ROOT = Path(__file__).resolve().parents[2]
BATCH = 3
OWNERS = ["encoder", "block03", "block06", "block09", "block12"]
LEARNING_RATE = 1e-2
# Attention's key bias has no gradient: with a tiny epsilon AdamW would turn rounding into steps.
EPS = 1e-4


def images(step: int, microbatch: int, replica: int, config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * microbatch + replica)
    side = config.img_size
    return {
        "images": torch.randn(BATCH, 3, side, side, generator=generator),
        "noise": torch.rand(BATCH, config.num_patches, generator=generator),
    }


def engine_for(
    microbatches: int,
    grid: Any,
    *,
    model: Model | None = None,
    settings: str = "cpu_fp32",
    clip: float = 0.0,
    rounds_weights: bool = False,
) -> tuple[Model, zero.Engine]:
    run = debug().replace(clip_grad=clip)
    content = load_ds_config(str(ROOT / "ds_configs" / f"{settings}.json"))
    sizes = BatchSizes(BATCH, microbatches, dist.get_world_size())
    resolved, _ = resolve_ds_config(content, run, sizes)
    model = model or build_model(debug, seed=1)
    optimizer = zero.build_optimizer(
        "adamw",
        parameter_groups(model, 0.05),
        betas=(0.9, 0.95),
        eps=EPS,
    )
    return model, zero.build_engine(model, optimizer, resolved, grid, rounds_weights=rounds_weights)


def reduced_gradients(engine: zero.Engine) -> list[Tensor]:
    gradients = engine.optimizer.averaged_gradients
    return [piece.clone() for group in sorted(gradients) for piece in gradients[group]]


def one_step(
    model: Model, engine: zero.Engine, step: int, microbatches: int, reduction: Any, joint: bool
) -> None:
    calls = microbatches * (1 if joint else 1 + len(model.decoders))
    with zero.reduced_step(engine, reduction, calls) as backward:
        for m in range(microbatches):
            inputs = images(step, m, dist.get_rank(), model.config)
            if joint:
                backward(model(**inputs).loss)
            else:
                local_backward(model, **inputs, backward=backward)


def everywhere(value: bool) -> bool:
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def check_local_equals_joint(grid: Any) -> dict[str, bool]:
    """Reduced gradients of local and joint backward, bit for bit."""
    result = {}
    for microbatches in (3, 4):
        for reduction in ("coalesced", "per_microbatch"):
            found = []
            for joint in (True, False):
                model, engine = engine_for(microbatches, grid)
                one_step(model, engine, 0, microbatches, reduction, joint)
                found.append(reduced_gradients(engine))
            equal = all(map(torch.equal, *found)) and any(g.abs().sum() > 0 for g in found[0])
            result[f"M={microbatches} {reduction}"] = everywhere(equal)
    return result


def reference_run(
    microbatches: int, steps: int, clip: float
) -> tuple[Model, list[float], dict[str, float]]:
    """Plain PyTorch in one process on the same global batches."""
    model = build_model(debug, seed=1)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.05), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS
    )
    norms, owners = [], {}
    for step in range(steps):
        for replica in range(dist.get_world_size()):
            for m in range(microbatches):
                loss = model(**images(step, m, replica, model.config)).loss
                (loss / (microbatches * dist.get_world_size())).backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    owner = gradient_owner(name)
                    square = parameter.grad.square().sum().item()
                    owners[owner] = owners.get(owner, 0.0) + square
        largest = clip if clip else float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), largest).item())
        optimizer.step()
        optimizer.zero_grad()
    return model, norms, {name: square**0.5 for name, square in owners.items()}


def check_equals_one_process(grid: Any) -> dict[str, Any]:
    """Largest parameter difference after 3 steps, and gradient norms beside the reference's."""
    result = {}
    for reduction in ("coalesced", "per_microbatch"):
        model, engine = engine_for(2, grid, clip=0.5)
        norms, owners = [], {}
        for step in range(3):
            one_step(model, engine, step, 2, reduction, joint=False)
            if step == 0:
                found = zero.gradient_norms(engine, OWNERS, gradient_owner)
                owners = {name: float(value) for name, value in found.items()}
            norms.append(zero.apply_step(engine, LEARNING_RATE)[0])
        reference, expected, expected_owners = reference_run(2, 3, clip=0.5)
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        result[reduction] = {
            "difference": max((p - q).abs().max().item() for p, q in pairs),
            "norms": [norms, expected],
            "owners": [owners, expected_owners],
        }
    return result


def check_state_round_trip(grid: Any) -> dict[str, bool]:
    """A fresh engine with copied weights and AdamW state takes exactly the same next step."""
    model, engine = engine_for(1, grid)
    for step in range(2):
        one_step(model, engine, step, 1, "coalesced", joint=False)
        zero.apply_step(engine, LEARNING_RATE)
    state = optimizer_state(engine)
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}

    second = build_model(debug, seed=1)
    for name, parameter in second.named_parameters():
        parameter.data.copy_(saved[name])
    _, second_engine = engine_for(1, grid, model=second)
    zero_state.load_optimizer_state(second_engine, state, step=2)
    loaded = optimizer_state(second_engine)
    same_state = all(torch.equal(state[key], loaded[key]) for key in state)
    for each, each_engine in ((model, engine), (second, second_engine)):
        one_step(each, each_engine, 2, 1, "coalesced", joint=False)
        zero.apply_step(each_engine, LEARNING_RATE)
    same_step = all(map(torch.equal, model.parameters(), second.parameters()))
    moved = any(not torch.equal(p, saved[name]) for name, p in model.named_parameters())
    return {
        "state": everywhere(same_state),
        "next step": everywhere(same_step),
        "moved": everywhere(moved),
    }


def check_overflow(grid: Any) -> dict[str, Any]:
    """Inf on rank 0 in step 1: who skipped, and the loss scales before and after each step."""
    result: dict[str, Any] = {}
    for name, precision in (("cpu_fp32", "fp32"), ("v100_fp16", "float16")):
        model, engine = engine_for(1, grid, settings=name)
        applied, scales, kept = [], [zero.loss_scale(engine)], []
        for step in range(3):
            broken = step == 1 and dist.get_rank() == 0
            with zero.reduced_step(engine, "coalesced", 5) as backward:

                def poisoned(
                    loss: Tensor,
                    backward: Callable[[Tensor], None] = backward,
                    broken: bool = broken,
                ) -> None:
                    backward(loss * float("inf") if broken else loss)

                with zero.autocast(precision, torch.device("cpu")):
                    inputs = images(step, 0, dist.get_rank(), model.config)
                    local_backward(model, **inputs, backward=poisoned)
            before = [p.detach().clone() for p in model.parameters()]
            applied.append(zero.apply_step(engine, LEARNING_RATE)[1])
            scales.append(zero.loss_scale(engine))
            kept.append(all(map(torch.equal, before, model.parameters())))
        mine = {"applied": applied, "scales": scales, "kept": kept}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        result[precision] = everyone
    return result


def check_silent_traps(grid: Any) -> dict[str, Any]:
    """What zero.py guards against: calls that other engines take silently."""
    model, engine = engine_for(2, grid)
    one_step(model, engine, 0, 2, "coalesced", joint=False)
    engine.set_gradient_accumulation_boundary(False)
    before = [p.detach().clone() for p in model.parameters()]
    engine.step()
    unchanged = all(map(torch.equal, before, model.parameters()))
    wrong_count = False
    with contextlib.suppress(AssertionError):
        one_wrong = zero.reduced_step(engine, "coalesced", 7)
        with one_wrong as backward:
            backward(model(**images(0, 0, 0, model.config)).loss)
        wrong_count = True
    return {"step without boundary does nothing": unchanged, "miscount passes": wrong_count}


def check_weight_gather(grid: Any) -> dict[str, bool]:
    """Updated weights under autocast: which are rounded, and that replicas agree on them."""
    result = {}
    for rounds in (True, False):
        model, engine = engine_for(1, grid, settings="a100_bf16", rounds_weights=rounds)
        with (
            zero.autocast(Precision.BFLOAT16, torch.device("cpu")),
            zero.reduced_step(engine, "coalesced", 5) as backward,
        ):
            inputs = images(0, 0, dist.get_rank(), model.config)
            local_backward(model, **inputs, backward=backward)
        before = [flat.clone() for flat in engine.weights.flats]
        zero.apply_step(engine, LEARNING_RATE, overlap=True)
        half = len(before[0]) // 2
        # The other replica's half of a group: not there before somebody waits for it.
        theirs = slice(0, half) if dist.get_rank() else slice(half, None)
        late = torch.equal(engine.weights.flats[0][theirs], before[0][theirs])
        engine.weights.finish()
        result[f"{rounds} not waited for"] = everywhere(late)
        masters = zero_state.master_weights(engine)
        rounded = rounded_by_autocast(model)
        equal = exact = True
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            everyone = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(everyone, parameter.detach())
            equal &= torch.equal(*everyone)
            master = masters[name]
            if rounds and parameter in rounded:
                exact &= torch.equal(parameter, master.bfloat16().float())
                exact &= not torch.equal(parameter, master)
            else:
                exact &= torch.equal(parameter, master)
        result[f"{rounds} equal on replicas"] = everywhere(equal)
        result[f"{rounds} rounded where it must be"] = everywhere(exact)
    return result


def check_unequal_groups(grid: Any) -> str:
    model = build_model(debug)
    groups = parameter_groups(model, 0.05)[: 2 - dist.get_rank()]
    optimizer = torch.optim.AdamW(groups)
    try:
        zero.build_engine(model, optimizer, {}, grid)
    except ValueError as error:
        return str(error)
    return "no error"


CHECKS: list[Callable[[Any], Any]] = [
    check_local_equals_joint,
    check_equals_one_process,
    check_state_round_trip,
    check_overflow,
    check_silent_traps,
    check_weight_gather,
    check_unequal_groups,
]


def main() -> None:
    torch.set_num_threads(1)
    zero.init_processes(timeout_seconds=300)
    grid = zero.build_grid(num_stages=1)
    results = {check.__name__: check(grid) for check in CHECKS}
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
