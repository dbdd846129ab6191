"""Silent corruption: what no step changed must keep its bits, and updates must come out twice.

A digest is the sum of a tensor's bits, read as whole numbers: any single flipped bit changes it.
Between two updates nothing may touch weights, fp32 masters or moments. They are therefore summed
after each update and again before the next, on the device; the verdict travels with the gradient
norm. Every N steps replicas compare their weights, and each repeats its neighbor's update.
Legend: G parameter groups, D replicas, n values of a shard.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.watch import place

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = ("weights", "fp32 masters", *zero_state.MOMENTS)


def digest(tensors: Sequence[Tensor]) -> Tensor:
    """Sums of the tensors' bits, int64 [number of tensors]."""
    return torch.stack([t.view(_WHOLE[t.element_size()]).sum(dtype=torch.int64) for t in tensors])


def repeat_update(group: dict[str, Any], step: Tensor, values: Tensor) -> list[Tensor]:
    """Weights and moments after AdamW's next update of `values`, [4, n]: these and a gradient.

    `group` tells rates, `step` the updates so far; both stay as they are.
    """
    weight, first, second, gradient = values.unbind()
    flat = torch.nn.Parameter(weight.clone())
    flat.grad = gradient
    twin = torch.optim.AdamW([{**group, "params": [flat]}])
    twin.state[flat] = {"step": step.clone(), "exp_avg": first, "exp_avg_sq": second}
    twin.step()
    return [flat.detach(), first, second]


class Digests:
    """Of one rank's weights and optimizer state."""

    def __init__(self, engine: zero.Engine, every: int, step: int) -> None:
        self._engine, self._every, self._step = engine, every, step
        self._group = engine.gradients.process_group
        self._after = self._sums()
        self._changed = torch.zeros_like(self._after, dtype=torch.bool)
        self._update = torch.zeros(1, dtype=torch.bool, device=self._after.device)
        self._replicas = torch.zeros_like(self._update)
        self.alarm = torch.zeros_like(self._update)
        self._repeated: Tensor | None = None
        optimizer = engine.optimizer.optimizer
        if isinstance(optimizer, torch.optim.AdamW):  # apex's has no hooks
            optimizer.register_step_pre_hook(self._before_group)
            optimizer.register_step_post_hook(self._after_group)

    def seconds(self) -> float:
        """What one digest takes, s; every step has two."""
        self._sums().tolist()
        began = time.perf_counter()
        self._sums().tolist()  # waits for the device
        return time.perf_counter() - began

    @property
    def _compares(self) -> bool:
        """Whether the step under way is one of those with comparisons between replicas."""
        return self._step % self._every == 0

    def _sums(self) -> Tensor:
        """[4 G]: weights, masters and both moments of each group."""
        shards = list(zero_state.shards(self._engine))
        rows = [zero_state.flat_weights(self._engine), *zip(*shards, strict=True)]
        return digest([tensor for row in rows for tensor in row])

    def before_update(self) -> None:
        """Compare with the sums after the last update."""
        self._step += 1
        self._changed = self._sums() != self._after
        self.alarm = self._changed.any() | self._update | self._replicas

    def after_update(self) -> None:
        """Sum what the update left; every N steps compare weights with the replicas'."""
        self._after = self._sums()
        count = dist.get_world_size(self._group)
        if not self._compares or count == 1:
            return
        weights = self._after[: len(self._after) // len(KINDS)]
        everyone = [torch.empty_like(weights) for _ in range(count)]
        dist.all_gather(everyone, weights, group=self._group)
        stacked = torch.stack(everyone)
        # The odd one is equal to fewer than the others are; of two, both are odd.
        agree = (stacked[:, None] == stacked[None]).all(-1).sum(1)
        mine = agree[dist.get_rank(self._group)]
        self._replicas |= (mine < agree.max()) | (agree.max() == 1)

    def _before_group(self, optimizer: Any, *_: Any) -> None:
        """Hand weights, moments and gradient of a group to the next replica, who updates them."""
        if not self._compares:
            return
        (group,) = optimizer.param_groups
        (flat,) = group["params"]
        state = optimizer.state[flat]
        if "exp_avg" not in state:
            self._repeated = None
            return
        mine = torch.stack([flat.detach(), state["exp_avg"], state["exp_avg_sq"], flat.grad])
        theirs = self._shift(mine)
        self._repeated = digest(repeat_update(group, state["step"], theirs))

    def _after_group(self, optimizer: Any, *_: Any) -> None:
        if not self._compares or self._repeated is None:
            return
        (group,) = optimizer.param_groups
        (flat,) = group["params"]
        state = optimizer.state[flat]
        mine = digest([flat.detach(), state["exp_avg"], state["exp_avg_sq"]])
        # What the replica before sent was its own; its result comes after it.
        self._update |= (self._shift(self._repeated, back=True) != mine).any()

    def _shift(self, tensor: Tensor, *, back: bool = False) -> Tensor:
        """What the replica before this one holds (or the one after); with one replica its own."""
        count, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        if count == 1:
            return tensor.clone()
        step = -1 if back else 1
        found = torch.empty_like(tensor)
        ranks = [dist.get_global_rank(self._group, (rank + s) % count) for s in (step, -step)]
        send = dist.P2POp(dist.isend, tensor, ranks[0], self._group)
        receive = dist.P2POp(dist.irecv, found, ranks[1], self._group)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        return found

    def found(self) -> list[str]:
        """What is wrong on which rank; every rank calls it after an alarm."""
        groups = self._changed.view(len(KINDS), -1).any(1).tolist()
        mine = [
            f"{kind} changed between two updates"
            for kind, bad in zip(KINDS, groups, strict=True)
            if bad
        ]
        mine += ["an update differs from its neighbor's"] * int(self._update)
        mine += ["weights differ from other replicas'"] * int(self._replicas)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (place(), mine))
        return [f"{where}: {', '.join(what)}" for where, what in everyone if what]
