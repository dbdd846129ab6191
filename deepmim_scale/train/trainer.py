"""Pre-training: load, backward, step, metrics, checkpoints.

Legend: B micro-batch, M micro-batches per step, L patches.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from deepmim_scale.batch import Batch
from deepmim_scale.checkpoint.saver import Saver
from deepmim_scale.config import ModelConfig, num_steps
from deepmim_scale.data.choose_backend import build_backend
from deepmim_scale.data.source import Source
from deepmim_scale.data.step_loader import (
    FeedOptions,
    Share,
    Span,
    StepLoader,
    build_step_loader,
    iter_validation,
)
from deepmim_scale.data.threads import WaitWatch, num_decoding_threads
from deepmim_scale.data.watched_source import WatchedSource
from deepmim_scale.ds_config import precision_of
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.methods import decoder_names, losses_of
from deepmim_scale.objectives import objective_of
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.grid import make_group
from deepmim_scale.parallel.stages import global_parameters
from deepmim_scale.plan.resolve import training_plan
from deepmim_scale.runs.environment import record_start
from deepmim_scale.runs.folder import CONFIG, write_config, writing
from deepmim_scale.runs.resume import set_aside
from deepmim_scale.runs.state import CheckpointState
from deepmim_scale.train.block_log import BlockLog
from deepmim_scale.train.garbage import collected_between_steps
from deepmim_scale.train.keeper import Keeper
from deepmim_scale.train.metrics import MetricsWriter, peak_memory_gib, throughput
from deepmim_scale.train.optim import peak_learning_rate, run_rate
from deepmim_scale.train.prepare import PreparedRun
from deepmim_scale.train.progress import Progress
from deepmim_scale.train.restore import find_start
from deepmim_scale.train.runtime import build_runtime
from deepmim_scale.train.step_trace import (
    StepTrace,
    describe,
    simulated_again,
    write_step_trace,
)

# A run whose every step overflows is lost; stop instead of spinning to the end. A float16 run first
# halves its scale from 65536 down to 1.
MAX_SKIPPED_IN_A_ROW = 20
SECONDS_TO_SEE_A_FILE = 60.0


class Trainer:
    """One rank's share of a run."""

    def __init__(self, prepared: PreparedRun, device: torch.device) -> None:
        self.prepared, self.device = prepared, device
        self.config, self.samples = prepared.config, prepared.samples
        self.source = WatchedSource(prepared.train)
        self.total_steps = num_steps(prepared.config, self.samples.steps_per_epoch)
        self.progress = Progress(is_main=dist.get_rank() == 0)
        self.start = find_start(prepared, self.total_steps)
        self.objective = prepared.objective
        runtime = build_runtime(
            prepared.config,
            prepared.pipeline,
            prepared.ds_config,
            device,
            self.objective,
            self.start.checkpoint,
            prepared.initial,
        )
        self.engine, self.executor, self.grid = runtime.engine, runtime.executor, runtime.grid
        self.pp_rank, self.dp_rank = runtime.pp_rank, runtime.dp_rank
        self.step, self.updates = self.start.step, self.start.updates
        self.block_log = BlockLog(self.engine.module, prepared.config.model.depth, device)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.step >= self.total_steps

    def run(self) -> None:
        """Train from the current step to the end."""
        config, progress = self.config, self.progress
        writer = None
        if dist.get_rank() == 0:
            with writing(config.output):
                write_config(config)
                # Before the writer drops the rows that are repeated.
                note = set_aside(config.output, self.step)
                record_start(
                    config.output,
                    step=self.step,
                    num_processes=dist.get_world_size(),
                    stages=config.stages,
                    microbatch_size=config.microbatch_size,
                )
                writer = MetricsWriter(config, config.output, self.step)
            if note:
                progress.print_main(note)
        check_shared(config.output)
        saver = Saver(
            config.output,
            self.engine,
            self.objective,
            self.grid,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
        )
        keeper = Keeper(
            config, config.output, self.engine, saver, self.checkpoint_state, self.images_of
        )
        if keeper.price:
            self.progress.print_main(keeper.price)
        loader, waits = self.build_loader(), WaitWatch(num_decoding_threads(config))
        skipped = 0
        progress.start(self.total_steps, self.step)
        try:
            with self._profiler() as profiler, collected_between_steps() as collect:
                for batches in loader:
                    keeper.ask(self.step + 1)
                    row, applied = self.train_step(batches, loader.wait_seconds)
                    reading = self.source.report(self.step, loader.wait_seconds)
                    if warning := waits.after_step(loader.wait_seconds):
                        progress.print_main(warning)
                    row = row and row | reading | keeper.figures()
                    skipped = 0 if applied else skipped + 1
                    if skipped == MAX_SKIPPED_IN_A_ROW:
                        raise RunFailure(
                            f"blr={config.blr}: {skipped} steps in a row had no finite gradient; "
                            "start again with a lower one or with --clip-grad"
                        )
                    if self.step == config.reschedule_after:
                        self.reschedule()
                    if self._validates_after(self.step):
                        row = (row or {}) | self.validate()
                    if writer is not None and row is not None:
                        writer.write(row)
                    progress.step(row, self.total_steps, config.print_every)
                    keeper.after_step(self.step, applied=applied, finished=self.finished)
                    collect(self.step)
                    if profiler is not None:
                        profiler.step()
        finally:
            progress.close()
            if writer is not None:
                writer.close()

    def build_loader(self) -> StepLoader:
        """The images of all steps that are left."""
        config, batch = self.config, self.prepared.batch
        source = cast(Source, self.source)
        backend, reason = build_backend(
            config,
            source,
            batch.microbatch_size,
            self.device,
            config.loader,
            config.decode,
            config.prefetch,
        )
        self.progress.print_main(reason)
        # The loader's collectives run on its own thread: they need a communicator of their own.
        group = make_group(self.grid.pipe_groups) if config.stages > 1 else None
        return build_step_loader(
            config,
            source,
            self.samples,
            Share(self.dp_rank, batch.num_replicas, batch.microbatches),
            Span(self.step, self.total_steps - self.step),
            FeedOptions(config.feed, config.check_feed, config.on_bad),
            group=group,
            backend=backend,
            device=self.device,
        )

    def train_step(
        self, batches: list[Batch], wait_seconds: float
    ) -> tuple[dict[str, Any] | None, bool]:
        """One optimizer step: the row of metrics if it is due, and whether weights changed."""
        began = time.perf_counter()
        config, names = self.config, losses_of(self.config.model)
        epoch = self.step / self.samples.steps_per_epoch
        peak = peak_learning_rate(config, self.prepared.batch.global_batch)
        rate = run_rate(config, peak, epoch, self.total_steps / self.samples.steps_per_epoch)
        microbatches = [batch.to(self.device) for batch in batches]
        calls = self.executor.num_backward_calls
        logs_blocks = config.log_blocks > 0 and (self.step + 1) % config.log_blocks == 0
        trace = StepTrace(self.device) if self.step + 1 == config.trace else None
        with (
            self.block_log.watching() if logs_blocks else contextlib.nullcontext(),
            zero.reduced_step(self.engine, config.reduction, calls) as backward,
        ):
            sums = self.executor.train(microbatches, backward)
        if trace is not None:
            trace.mark_reduced()
        blocks: dict[str, Any] = {}
        if logs_blocks:
            blocks["block_magnitudes"] = self.block_log.magnitudes()
            blocks["block_grad_norms"] = self.block_log.gradient_norms(self.engine)
        owners = ["encoder", *decoder_names(config.model).values()]
        norms = zero.gradient_norms(self.engine, owners, gradient_owner)
        # A teacher that learns reads all weights at once.
        overlap = not objective_of(config.model).whole_model
        norm, applied = zero.apply_step(self.engine, rate, overlap=overlap)
        if applied:
            self.objective.after_step(global_parameters(self.engine.module))
        self.step += 1
        self.updates += applied
        if trace is not None:
            trace.mark_updated()
            self._write(trace, wait_seconds)
        if applied and not self._reports_after(self.step):
            return None, applied  # nothing more is read from the device
        # A loss is known on the rank that evaluates it; elsewhere it counts as 0.
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = [sums.get(name, none) / len(batches) for name in names]
        busy, whole = self.executor.busy_and_step_seconds()
        # All numbers of the step are read from the device at once.
        everyone = self._gather(mine, [peak_memory_gib(self.device), 1 - busy / whole])
        replicas = self.prepared.batch.num_replicas
        *by_loss, memory, idle = map(list, zip(*everyone, strict=True))
        losses = {n: sum(x) / replicas for n, x in zip(names, by_loss, strict=True)}
        seconds = time.perf_counter() - began + wait_seconds
        world = dist.get_world_size()
        row = {
            "step": self.step,
            "epoch": epoch,
            "loss": total_loss(config.model, losses),
            "losses": losses,
            "grad_norm": norm,
            "grad_norms": norms,
            "learning_rate": rate,
            "loss_scale": zero.loss_scale(self.engine),
            "skipped": not applied,
            "seconds": seconds,
            **throughput(
                config.model, self.prepared.batch.global_batch, seconds, world, self.device
            ),
            "peak_memory_gib": memory,
            "idle_fraction": idle,
            "loader_wait_ms": wait_seconds * 1e3,
            **blocks,
        }
        return row, applied

    def _write(self, trace: StepTrace, wait_seconds: float) -> None:
        ranks = trace.finish(self.executor.marks, wait_seconds)
        if dist.get_rank() == 0:
            plan, schedule = self.prepared.pipeline, self.executor.schedule
            simulated = simulated_again(self.config, plan, schedule, ranks)
            facts = {
                "layout": plan.text,
                "split_backward": schedule.style.split_backward,
                "precision": precision_of(self.prepared.ds_config),
                "num_replicas": self.prepared.batch.num_replicas,
            }
            shares = write_step_trace(self.config.output, self.step, facts, ranks, simulated)
            self.progress.print_main(describe(self.step, shares))

    def _reports_after(self, step: int) -> bool:
        """Whether a row is due, to be written or to be printed."""
        config = self.config
        steps = (config.log_every, config.print_every, config.log_blocks)
        due = any(every and step % every == 0 for every in steps)
        return due or self.finished or self._validates_after(step)

    def _gather(self, scalars: list[Tensor], numbers: list[float]) -> list[list[float]]:
        """A row for each rank: scalars on the device, then numbers that the host knows."""
        known = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        mine = torch.cat([torch.stack(scalars).double(), known])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        rows: list[list[float]] = torch.stack(everyone).tolist()
        return rows

    def _validates_after(self, step: int) -> bool:
        every = self.config.validate_every * self.samples.steps_per_epoch
        if self.prepared.validation is None or every == 0:
            return False
        return self.finished or int(step / every) > int((step - 1) / every)

    def validate(self) -> dict[str, Any]:
        """Validation losses under fixed masks, as row entries."""
        validation, replicas = self.prepared.validation, self.prepared.batch.num_replicas
        assert validation is not None, "validation needs validation images"
        names = losses_of(self.config.model)
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.device)
        for batch in iter_validation(
            self.config,
            validation,
            dp_rank=self.dp_rank,
            num_replicas=replicas,
            on_bad=self.config.on_bad,
            device=self.device,
        ):
            found = self.executor.evaluate(batch.to(self.device))
            size = len(batch.images)
            sums[:-1] += sums.new_tensor([float(found.get(name, 0.0)) * size for name in names])
            sums[-1] += size * (self.pp_rank == 0)
        dist.all_reduce(sums)
        losses = dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))
        total = total_loss(self.config.model, losses)
        return {"validation_loss": total, "validation_losses": losses}

    def reschedule(self) -> None:
        """Build the schedule again from what its instructions took in the last step.

        Only the order of work changes: sums keep theirs, and so does every bit of the weights.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.executor.seconds())
        found: dict[Any, list[float]] = {}
        for part in everyone:
            for key, seconds in part.items():
                found.setdefault(key, []).append(seconds)
        measured = {key: sum(values) / len(values) for key, values in found.items()}
        built = training_plan(self.config, self.prepared.batch.microbatches, measured).built
        self.executor.replace_schedule(built.schedule)
        self.progress.print_main(
            f"schedule rebuilt from measured times: simulated {built.timeline.makespan * 1e3:.1f} "
            f"ms per step, idle share {built.timeline.idle_fraction:.1%}"
        )

    def images_of(self, step: int) -> Sequence[int]:
        """Sample ids of all images of a step, numbered from 1."""
        return [int(i) for i in self.samples.micro_batch(step - 1, 0, 0, 1, 1)]

    def checkpoint_state(self) -> CheckpointState:
        """The place in the run, as a checkpoint tells it."""
        return CheckpointState(
            step=self.step,
            updates=self.updates,
            total_steps=self.total_steps,
            global_batch=self.prepared.batch.global_batch,
            manifest_sha=self.prepared.train.sha,
            precision=precision_of(self.prepared.ds_config),
            num_stages=self.config.stages,
        )

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[torch.profiler.profile | None]:
        if not self.config.profile:
            yield None
            return
        trace = Path(self.config.output) / f"trace_rank{dist.get_rank()}.json"
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=9, warmup=1, active=3, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)),
        ) as profiler:
            yield profiler


def check_shared(output: str) -> None:
    """UserError on every rank, before the first save would fail, if a node misses the folder."""
    dist.barrier()
    config_file = Path(output) / CONFIG
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE  # NFS remembers what it did not find
    while not config_file.is_file() and time.monotonic() < deadline:
        time.sleep(1.0)
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, "" if config_file.is_file() else socket.gethostname())
    blind = sorted({host for host in hosts if host})
    if blind:
        raise UserError(
            f"output={output}: not seen from {', '.join(blind)}; give a folder that all nodes share"
        )


def total_loss(model: ModelConfig, losses: dict[str, float]) -> float:
    """The weighted sum of all losses."""
    return sum(losses[name] * loss.weight for name, loss in losses_of(model).items())


def gradient_owner(name: str) -> str:
    """Under which name a parameter's gradient norm is reported: its decoder's, or "encoder"."""
    return name.split(".")[1] if name.startswith("decoders.") else "encoder"
