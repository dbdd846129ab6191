"""Training of heads on frozen tokens: all heads at once, on any number of processes, resumable.

Every rank holds all heads and optimizers; their gradients are averaged over the ranks.
Legend: G images per step over all ranks, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from deepmim_scale.checkpoint import files
from deepmim_scale.data.philox import SAMPLES, philox
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import Source, good_ids
from deepmim_scale.data.step_loader import Share, Span
from deepmim_scale.errors import UserError
from deepmim_scale.evaluate.frozen import FrozenEncoder
from deepmim_scale.finetune.data import (
    LabelledSources,
    TrainingImages,
    iter_evaluation,
    iter_steps,
)
from deepmim_scale.finetune.evaluation import Counter
from deepmim_scale.finetune.transform import Transform
from deepmim_scale.settings import pluralize


@dataclass(frozen=True)
class Contestant:
    """One head with its optimizer; `block` says whose tokens it reads."""

    block: int
    setting: str
    """What tells it from others of its block, as "lr 1e-3, decay 0.05"; may be empty."""
    head: nn.Module
    optimizer: torch.optim.Optimizer
    peak: float
    """Its highest learning rate."""

    @property
    def name(self) -> str:
        """Block and setting."""
        return f"block{self.block:02d} {self.setting}".strip()


@dataclass(frozen=True)
class ProbePlan:
    """How long and on what heads train."""

    steps: int
    global_batch: int
    """G."""
    rate: Callable[[float, int], float]
    """(peak, step) -> learning rate of the step, from 0."""
    transforms: tuple[Transform, Transform]
    """Of training and of evaluation."""
    held_out: float
    """Share of the training images that choose among the heads of a block."""
    workers: int
    save_every: int
    seed: int


def split(source: Source, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out ids of the good samples, each ascending; the latter may be empty."""
    ids = good_ids(source)
    order = np.argsort(philox(seed, 1, ids, 0, SAMPLES)[0], kind="stable")
    count = round(share * len(ids))
    return np.sort(ids[order[count:]]), np.sort(ids[order[:count]])


class TrainedProbe:
    """Heads on one frozen encoder."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        sources: LabelledSources,
        contestants: list[Contestant],
        plan: ProbePlan,
        device: torch.device,
    ) -> None:
        self.encoder, self.sources, self.plan = encoder.to(device), sources, plan
        self.contestants, self.device = contestants, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if plan.global_batch % self.world:
            raise UserError(
                f"global_batch={plan.global_batch}: must be divisible by the "
                f"{pluralize(self.world, 'process', 'processes')}"
            )
        self.training_ids, self.held_out = split(sources.train, plan.held_out, plan.seed)
        self.samples = SamplePlan(len(self.training_ids), plan.seed, plan.global_batch)
        for contestant in contestants:
            contestant.head.to(device)

    def run(self, state: Path | None, settings: Mapping[str, Any]) -> None:
        """Train to the end; goes on from `state`, where it keeps what it has, if it fits."""
        first = self._load(state, settings) if state else 0
        images = TrainingImages(
            self.sources.train,
            self.sources.train_labels,
            self.samples,
            self.plan.transforms[0],
            "fail",
            self.training_ids,
        )
        share, span = Share(self.rank, self.world, 1), Span(first, self.plan.steps - first)
        steps = iter_steps(images, self.samples, share, span, self.plan.workers)
        bar = tqdm(steps, initial=first, total=self.plan.steps, unit="step", disable=self._silent())
        for step, (batch,) in enumerate(bar, start=first):
            pixels, labels = batch.to(self.device)
            self._step(self.encoder.tokens(pixels), labels, step)
            done = step + 1
            if state and (done % self.plan.save_every == 0 or done == self.plan.steps):
                self._save(state, settings, done)

    def _silent(self) -> bool | None:
        return None if self.rank == 0 else True

    def _step(self, tokens: Mapping[int, Tensor], labels: Tensor, step: int) -> None:
        for one in self.contestants:
            one.head.train()
            cross_entropy(one.head(tokens[one.block]), labels).backward()
        if self.world > 1:
            gradients = [p.grad for _, p in self._parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = (flat / self.world).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        for one in self.contestants:
            for group in one.optimizer.param_groups:
                group["lr"] = self.plan.rate(one.peak, step)
            one.optimizer.step()
            one.optimizer.zero_grad()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for number, one in enumerate(self.contestants):
            for name, parameter in one.head.named_parameters():
                yield f"{number}.{name}", parameter

    @torch.no_grad()
    def count(self, *, validation: bool) -> dict[str, float]:
        """Accuracy in percent of each contestant, on validation or on held-out images."""
        source = self.sources.val if validation else self.sources.train
        labels = self.sources.val_labels if validation else self.sources.train_labels
        ids = good_ids(source) if validation else self.held_out
        for one in self.contestants:
            one.head.eval()
            for buffer in one.head.buffers():  # batch norm's, of each rank's own images
                dist.broadcast(buffer, src=0)
        names = [one.name for one in self.contestants]
        counter = Counter(names, 1, self.device)
        for images in iter_evaluation(
            source,
            labels,
            self.plan.transforms[1],
            rank=self.rank,
            num_ranks=self.world,
            batch=64,
            workers=self.plan.workers,
            ids=ids,
        ):
            pixels, expected = images.to(self.device)
            tokens = self.encoder.tokens(pixels)
            for one in self.contestants:
                counter.add(one.name, one.head(tokens[one.block]), expected)
        counter.reduce(len(ids))
        return {name: 100 * found[0] / found[3] for name, found in counter.counts.items()}

    def choose(self) -> dict[int, tuple[str, float]]:
        """For each block the setting that is best on held-out images, and its validation accuracy.

        Of equals the first wins.
        """
        validation = self.count(validation=True)
        choosing = self.count(validation=False) if len(self.held_out) else validation
        result: dict[int, tuple[str, float]] = {}
        for block in self.encoder.blocks:
            mine = [one for one in self.contestants if one.block == block]
            best = max(mine, key=lambda one: choosing[one.name])
            result[block] = best.setting, validation[best.name]
        return result

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for number, one in enumerate(self.contestants):
            for name, value in one.head.state_dict().items():
                tensors[f"head/{number}.{name}"] = value
            for name, parameter in one.head.named_parameters():
                for key, value in one.optimizer.state[parameter].items():
                    tensors[f"optimizer/{number}.{name}/{key}"] = value
        return tensors

    def _save(self, path: Path, settings: Mapping[str, Any], step: int) -> None:
        if self.rank == 0:
            part = path.with_name(path.name + ".part")
            header = {"step": str(step), "settings": fingerprint(settings)}
            files.write_tensors(part, self._tensors(), header)
            part.rename(path)
        dist.barrier()

    def _load(self, path: Path, settings: Mapping[str, Any]) -> int:
        if not path.is_file():
            return 0
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        if header.get("settings") != fingerprint(settings):
            raise UserError(f"state={path}: belongs to a probe of other settings; delete it")
        tensors = load_file(path)
        for number, one in enumerate(self.contestants):
            prefix = f"head/{number}."
            mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            one.head.load_state_dict(mine)
            for name, parameter in one.head.named_parameters():
                place = f"optimizer/{number}.{name}/"
                for key, value in tensors.items():
                    if key.startswith(place):
                        # AdamW counts its steps on the CPU.
                        kept = value if value.ndim == 0 else value.to(self.device)
                        one.optimizer.state[parameter][key.removeprefix(place)] = kept
        return int(header["step"])


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Digest of what decides a probe's result."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
