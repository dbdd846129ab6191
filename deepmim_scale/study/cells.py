"""The cells of a study: every depth with every number of stages and schedule, legal or not.

A cell is a command line of pre-training. All cells have the same processes and images per step, so
those of one depth do the same mathematics. One stage, plain data parallelism with ZeRO-2, is the
baseline of its depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepmim_scale.arguments import parse_run
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.ds_config import resolve_batch
from deepmim_scale.errors import UserError
from deepmim_scale.methods import method_of
from deepmim_scale.pipeline.compatibility import best_placement, check_combination
from deepmim_scale.pipeline.registry import DEFAULT
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.plan.planner import predict
from deepmim_scale.plan.row import Plan
from deepmim_scale.presets import load_preset
from deepmim_scale.study.settings import StudyArguments


@dataclass(frozen=True)
class CellRun:
    """What a legal cell runs."""

    words: tuple[str, ...]
    """Flags of pretrain, all but --output."""
    config: RunConfig
    replicas: int
    microbatches: int


@dataclass(frozen=True)
class Cell:
    """One place in the study's table."""

    depth: int
    stages: int
    schedule: str
    job: CellRun | None
    problem: str = ""
    """Why there is no job, in one line."""

    @property
    def name(self) -> str:
        """As in the folders of runs."""
        return f"d{self.depth}_p{self.stages}_{self.schedule}"

    def run(self, repeat: int) -> str:
        """Name of one of its runs."""
        return f"{self.name}_r{repeat}"


def build_cells(args: StudyArguments) -> list[Cell]:
    """All cells by depth, the baseline of each depth first; UserError if none is legal."""
    cells = [
        _cell(args, depth, stages, schedule)
        for depth in args.depths
        for stages in sorted({1, *args.stages})
        for schedule in (args.schedules if stages > 1 else (DEFAULT,))
    ]
    if not any(cell.job for cell in cells):
        raise UserError(f"no cell can be run; the first, {cells[0].name}: {cells[0].problem}")
    return cells


def _cell(args: StudyArguments, depth: int, stages: int, schedule: str) -> Cell:
    try:
        return Cell(depth, stages, schedule, _job(args, depth, stages, schedule))
    except UserError as error:
        return Cell(depth, stages, schedule, None, str(error))


def _job(args: StudyArguments, depth: int, stages: int, schedule: str) -> CellRun:
    if args.processes % stages:
        raise UserError(f"stages={stages}: must divide the {args.processes} processes")
    words = _words(args, depth, stages, schedule)
    if args.evaluate and stages == 1:
        words += _kept_checkpoints(args, depth)
    config = parse_run(words, prog="pretrain")
    batch = resolve_batch(config, args.processes // stages)
    check_combination(
        config.model, stages, schedule, config.placement, config.reduction, config.gradient_flow
    )
    return CellRun(words, config, batch.num_replicas, batch.microbatches)


def _words(args: StudyArguments, depth: int, stages: int, schedule: str) -> tuple[str, ...]:
    preset = load_preset(args.preset).model
    spread = method_of(preset).free_taps and depth != preset.depth
    return (
        *("--preset", args.preset, "--data", args.data, "--depth", str(depth)),
        *(("--taps", f"even:{len(preset.taps)}") if spread else ()),
        *("--stages", str(stages), "--schedule", schedule),
        *("--placement", best_placement(preset, stages)),
        *("--microbatch-size", str(args.microbatch_size)),
        *("--global-batch", str(args.global_batch), "--steps", str(args.steps)),
        *("--save-every", "0", "--validate-every", "0"),
        *args.flags,  # the user's come last and win
    )


def _model(args: StudyArguments, depth: int) -> ModelConfig:
    """What every cell of a depth trains."""
    return parse_run(_words(args, depth, 1, DEFAULT), prog="pretrain").model


def equal_flops_step(args: StudyArguments, depth: int) -> int:
    """The step at which cells of a depth have cost what the shallowest cost in all."""
    shallow, deep = (
        model_cost(_model(args, d)).whole.training_flops for d in (min(args.depths), depth)
    )
    return max(round(args.steps * shallow / deep), 1)


def _kept_checkpoints(args: StudyArguments, depth: int) -> tuple[str, ...]:
    """Flags that keep the last checkpoint, and that of equal FLOPs."""
    every = str(equal_flops_step(args, depth))
    return ("--save-every", every, "--keep-every", every, "--keep-checkpoints", "1")


def prediction(args: StudyArguments, job: CellRun) -> Plan:
    """What the planner expects of a job on the cluster that the study names."""
    config = job.config
    return predict(
        config.model,
        args.cluster,
        config.stages,
        config.schedule,
        config.microbatch_size,
        job.microbatches,
        config.placement,
        config.reduction,
    )
