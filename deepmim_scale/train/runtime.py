"""One rank's share of a pipeline, ready to run: stages, engine, messages, executor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepmim_scale.checkpoint.initial import Initial, put
from deepmim_scale.checkpoint.load import load_learned, load_optimizer, load_weights
from deepmim_scale.config import RunConfig
from deepmim_scale.ds_config import precision_of
from deepmim_scale.models.blocks import compile_blocks
from deepmim_scale.models.weight_queue import split_weight_gradients
from deepmim_scale.objectives import Objective, objective_of
from deepmim_scale.parallel import zero
from deepmim_scale.parallel.executor import Executor
from deepmim_scale.parallel.p2p import Channels
from deepmim_scale.parallel.stages import RankStages, build_rank
from deepmim_scale.plan.resolve import TrainingPlan
from deepmim_scale.train.optim import parameter_groups


@dataclass(frozen=True)
class Runtime:
    """What trains on this rank."""

    grid: Any
    """DeepSpeed's grid of stages and replicas."""
    stages: RankStages
    engine: zero.Engine
    channels: Channels
    executor: Executor
    objective: Objective

    @property
    def pp_rank(self) -> int:
        """Place in the pipeline."""
        return self.grid.get_stage_id()

    @property
    def dp_rank(self) -> int:
        """Which of the pipelines."""
        return self.grid.get_data_parallel_rank()


def build_runtime(
    config: RunConfig,
    plan: TrainingPlan,
    ds_config: dict[str, Any],
    device: torch.device,
    objective: Objective,
    checkpoint: Path | None = None,
    initial: Initial | None = None,
) -> Runtime:
    """Build this rank's part of a run, with the weights and optimizer state of a checkpoint.

    Without one it begins with `initial`, or else with random weights. Every rank calls it;
    ds_config is resolved (no "auto").
    """
    grid, schedule = zero.build_grid(config.stages), plan.built.schedule
    pp_rank = grid.get_stage_id()
    stages = build_rank(
        config.model,
        plan.layout,
        schedule.pipeline,
        pp_rank,
        seed=config.seed,
        recompute=config.recompute,
    )
    if schedule.style.split_backward:
        split_weight_gradients(stages)
    if config.compile:
        compile_blocks(stages)
    if checkpoint is not None:
        load_weights(checkpoint, stages)
    elif initial is not None:
        put(initial, stages)
    stages.to(device)
    optimizer = zero.build_optimizer(
        config.optimizer,
        parameter_groups(stages, config.weight_decay),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    engine = zero.build_engine(
        stages,
        optimizer,
        ds_config,
        grid,
        # A teacher that learns from the weights gets them whole.
        rounds_weights=not objective_of(config.model).whole_model,
    )
    if checkpoint is not None:
        load_optimizer(checkpoint, engine)
        load_learned(checkpoint, objective)
    channels = Channels(schedule, grid.pipe_groups, device, config.timeout)
    objective.to(device)
    executor = Executor(
        plan,
        pp_rank,
        stages,
        channels,
        objective,
        precision_of(ds_config),
        engine.gradients,
        engine.weights,
    )
    return Runtime(grid, stages, engine, channels, executor, objective)
