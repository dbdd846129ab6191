"""Fine-tuning: load, mix, backward, step, count, checkpoints.

Legend: M micro-batches per step, D replicas, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.checkpoint import files
from deepmim_scale.checkpoint.load import (
    load_learned,
    load_optimizer,
    load_weights,
)
from deepmim_scale.checkpoint.saver import Saver
from deepmim_scale.config import num_steps
from deepmim_scale.data.step_loader import Share, Span
from deepmim_scale.ds_config import precision_of
from deepmim_scale.errors import RunFailure
from deepmim_scale.finetune.data import Images, TrainingImages, iter_steps
from deepmim_scale.finetune.draws import seed_drop_path
from deepmim_scale.finetune.evaluation import Counter, evaluate
from deepmim_scale.finetune.files import step_line, summarize, write_weights
from deepmim_scale.finetune.mixing import Mixing
from deepmim_scale.finetune.prepare import PreparedFinetune, write_config
from deepmim_scale.finetune.recipe import build_loss
from deepmim_scale.parallel import zero, zero_state
from deepmim_scale.parallel.grid import ProcessGrid
from deepmim_scale.runs.environment import record_start
from deepmim_scale.runs.folder import read_metrics, writing
from deepmim_scale.runs.resume import set_aside
from deepmim_scale.runs.state import CheckpointState
from deepmim_scale.train.ema import Ema
from deepmim_scale.train.keeper import Keeper
from deepmim_scale.train.metrics import MetricsWriter, flop_rates, peak_memory_gib
from deepmim_scale.train.optim import finetune_groups, learning_rate
from deepmim_scale.train.progress import Progress
from deepmim_scale.train.restore import Wanted, find_checkpoint
from deepmim_scale.train.trainer import MAX_SKIPPED_IN_A_ROW, check_shared

Row = dict[str, Any]


class Finetuner:
    """One replica's share of a fine-tuning run."""

    def __init__(self, prepared: PreparedFinetune, device: torch.device) -> None:
        self.prepared, self.device, self.config = prepared, device, prepared.config
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.progress = Progress(is_main=self.rank == 0, line=step_line)
        self.total_steps = num_steps(self.config, prepared.samples.steps_per_epoch)
        self.precision = precision_of(prepared.ds_config)
        wanted = Wanted(
            self.config.output,
            self.config.resume,
            "",
            self.config.data,
            prepared.sources.train.sha,
            self.config.deepspeed_config,
            self.precision,
        )
        self.start = find_checkpoint(wanted, prepared.may_resume, self.total_steps)
        self.step, self.updates = self.start.step, self.start.updates
        model = prepared.model
        if self.start.checkpoint is not None:
            load_weights(self.start.checkpoint, model)
        model.to(device)
        self.grid = zero.build_grid(1)
        self.engine = _build_engine(prepared, model, self.grid)
        self.model = self.engine.module
        self.average: Ema | None = None
        if self.config.ema_decay:
            self.average = Ema(self._weights(), self.config.ema_decay)
        if self.start.checkpoint is not None:
            load_optimizer(self.start.checkpoint, self.engine)
            if self.average is not None:
                load_learned(self.start.checkpoint, self.average)
                self.average.updates = self.updates
        self._mix = Mixing(
            mixup=self.config.mixup,
            cutmix=self.config.cutmix,
            smoothing=self.config.smoothing,
            num_classes=len(prepared.sources.names),
            seed=self.config.seed,
        )
        self._loss = build_loss(mixes=self.config.mixes, smoothing=self.config.smoothing)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.step >= self.total_steps

    def run(self) -> None:
        """Train from the current step to the end."""
        config, samples = self.config, self.prepared.samples
        writer = None
        if self.rank == 0:
            with writing(config.output):
                write_config(config)
                note = set_aside(config.output, self.step)
                record_start(config.output, step=self.step, num_processes=self.world)
                writer = MetricsWriter(config, config.output, self.step)
            if note:
                self.progress.print_main(note)
        check_shared(config.output)
        saver = Saver(
            config.output, self.engine, self.average, self.grid, keep=config.keep_checkpoints
        )
        keeper = Keeper(
            config, config.output, self.engine, saver, self.checkpoint_state, self.images_of
        )
        if keeper.price:
            self.progress.print_main(keeper.price)
        images = TrainingImages(
            self.prepared.sources.train,
            self.prepared.sources.train_labels,
            samples,
            self.prepared.transforms[0],
            config.on_bad,
        )
        share = Share(self.rank, self.world, self.prepared.batch.microbatches)
        span = Span(self.step, self.total_steps - self.step)
        skipped = 0
        self.progress.start(self.total_steps, self.step)
        try:
            waited = time.perf_counter()
            for batches in iter_steps(images, samples, share, span, config.loader_workers):
                keeper.ask(self.step + 1)
                row, applied = self.train_step(batches, time.perf_counter() - waited)
                skipped = 0 if applied else skipped + 1
                if skipped == MAX_SKIPPED_IN_A_ROW:
                    raise RunFailure(
                        f"blr={config.blr}: {skipped} steps in a row had no finite gradient; "
                        "start again with a lower one or with --clip-grad"
                    )
                row |= keeper.figures()
                if self._evaluates_after(self.step):
                    row |= self.evaluate()
                if writer is not None:
                    writer.write(row)
                self._keep_weights(row)
                self.progress.step(row, self.total_steps, config.print_every)
                keeper.after_step(self.step, applied=applied, finished=self.finished)
                waited = time.perf_counter()
        finally:
            self.progress.close()
            if writer is not None:
                writer.close()

    def train_step(self, batches: list[Images], wait_seconds: float) -> tuple[Row, bool]:
        """One optimizer step: the row of metrics, and whether it changed the weights."""
        began = time.perf_counter()
        config, samples, batch = self.config, self.prepared.samples, self.prepared.batch
        epoch = self.step / samples.steps_per_epoch
        rate = learning_rate(
            config.blr * batch.global_batch / 256,
            epoch,
            warmup_epochs=config.warmup_epochs,
            total_epochs=self.total_steps / samples.steps_per_epoch,
            min_lr=config.min_lr,
        )
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with zero.reduced_step(self.engine, config.reduction, len(batches)) as backward:
            for number, images in enumerate(batches):
                loss = self._microbatch_loss(images, number * self.world + self.rank)
                total += loss.detach() / len(batches)
                backward(loss)
        norm, applied = zero.apply_step(self.engine, rate)
        self.step += 1
        self.updates += applied
        if applied and self.average is not None:
            self.average.update(self._weights())
        dist.all_reduce(total)
        seconds = time.perf_counter() - began + wait_seconds
        row = {
            "step": self.step,
            "epoch": epoch,
            "loss": total.item() / self.world,
            "grad_norm": norm,
            "learning_rate": rate,
            "loss_scale": zero.loss_scale(self.engine),
            "skipped": not applied,
            "seconds": seconds,
            **flop_rates(
                self.prepared.training_flops, batch.global_batch, seconds, self.world, self.device
            ),
            "peak_memory_gib": peak_memory_gib(self.device),
            "loader_wait_ms": wait_seconds * 1e3,
        }
        return row, applied

    def _microbatch_loss(self, images: Images, part: int) -> Tensor:
        """Mean loss of one micro-batch; `part` is its number over all replicas."""
        pixels, labels = images.to(self.device)
        pixels, targets = self._mix(pixels, labels, self.step, part)
        seed_drop_path(self.config.seed, self.step, part)
        with zero.autocast(self.precision, self.device):
            logits = self.model(pixels.to(self._dtype()))
        return self._loss(logits, targets)

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _weights(self) -> dict[str, Tensor]:
        """The weights in full precision, on this device."""
        if self.precision.is_pure:
            masters = zero_state.master_weights(self.engine)
            return {name: value.to(self.device) for name, value in masters.items()}
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _evaluates_after(self, step: int) -> bool:
        every = self.config.validate_every * self.prepared.samples.steps_per_epoch
        return self.finished or int(step / every) > int((step - 1) / every)

    def evaluate(self) -> Row:
        """Accuracies in percent and loss on all validation images, as row entries."""
        variants = {"": self._weights()}
        if self.average is not None and self.average.updates:
            variants["ema_"] = self.average.averages()
        counter = evaluate(self.prepared, self.model, variants, self.precision, self.device)
        return counter.row()

    def _keep_weights(self, row: Row) -> None:
        """After an evaluation write the weights that it counted, where they are the best or last.

        What is published of a run with an average is the average.
        """
        if "accuracy" not in row:
            return
        summary: list[dict[str, Row]] = [{}]
        if self.rank == 0:
            summary = [summarize(read_metrics(self.config.output))]
        dist.broadcast_object_list(summary, src=0)
        names = [
            name
            for name, wanted in (
                (files.BEST, summary[0]["best"]["step"] == self.step),
                (files.LAST, self.finished),
            )
            if wanted
        ]
        if not names:
            return
        averages = self.average.averages() if self.average and self.average.updates else None
        weights = averages or zero_state.master_weights(self.engine, keep=self.rank == 0)
        if self.rank == 0:
            with writing(self.config.output):
                write_weights(self.prepared, weights, summary[0], names)

    def images_of(self, step: int) -> Sequence[int]:
        """Sample ids of all images of a step, numbered from 1."""
        return [int(i) for i in self.prepared.samples.micro_batch(step - 1, 0, 0, 1, 1)]

    def checkpoint_state(self) -> CheckpointState:
        """The place in the run, as a checkpoint tells it."""
        return CheckpointState(
            step=self.step,
            updates=self.updates,
            total_steps=self.total_steps,
            global_batch=self.prepared.batch.global_batch,
            manifest_sha=self.prepared.sources.train.sha,
            precision=self.precision,
            num_stages=1,
        )


def _build_engine(
    prepared: PreparedFinetune, model: torch.nn.Module, grid: ProcessGrid
) -> zero.Engine:
    config = prepared.config
    assert config.optimizer in ("adamw", "apex"), "the settings know two optimizers"
    optimizer = zero.build_optimizer(
        "apex" if config.optimizer == "apex" else "adamw",
        finetune_groups(model, config.weight_decay, config.layer_decay),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    return zero.build_engine(model, optimizer, prepared.ds_config, grid)


def evaluate_once(prepared: PreparedFinetune, device: torch.device) -> Counter:
    """What the given weights get right, without training."""
    model, precision = prepared.model.to(device), precision_of(prepared.ds_config)
    if precision.is_pure:
        model.to(getattr(torch, precision.product))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return evaluate(prepared, model, {"": weights}, precision, device)
