"""What a study is asked to do, and whether its folder may go on with it. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import model_validator

from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json
from deepmim_scale.pipeline.registry import BASELINE, DEFAULT, trainable_schedules
from deepmim_scale.plan.hardware import GPUS, lookup, network_gbytes
from deepmim_scale.plan.row import Cluster
from deepmim_scale.presets import load_preset
from deepmim_scale.settings import File, Folder, FrozenConfig, Names, comma_separated

RESULTS = "study.json"
RUNS = "runs"
# A study may be extended by these, and predicted for another GPU; all else makes it another study.
_FREE = frozenset(
    {
        "output",
        "depths",
        "stages",
        "schedules",
        "repeats",
        "gpu",
        "network",
        "hostfile",
        "dry_run",
        "beside",
        "status",
        "collect",
        "slurm",
        "sbatch",
        "only",
    }
)
EVALUATIONS = ("knn", "linear", "linear-sgd", "attentive", "finetune")
# Flags of pre-training that the study sets for each cell.
_TAKEN = (
    "--preset",
    "--config",
    "--data",
    "--output",
    "--depth",
    "--stages",
    "--schedule",
    "--schedule-file",
    "--steps",
    "--microbatch-size",
    "--microbatches",
    "--global-batch",
)


def _numbers(key: str) -> Any:
    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(sorted({int(word) for word in text.split(",")}))
        except ValueError:
            raise UserError(f"{key}={text}: must be whole numbers as 12,24") from None

    return comma_separated(read, "N,N,...")


class StudyArguments(FrozenConfig):
    """Measure images/s, memory, idle share and loss over depth, stages and schedules."""

    output: Folder = ""
    """Folder of the study; given again, what is measured already is kept."""
    status: Folder = ""
    """Say how far the runs of this study are, and do nothing else."""
    collect: Folder = ""
    """Write the tables of this study from the runs that are there, and do nothing else."""
    preset: str = "deepmim_vit_b_12"
    """Method, widths and decoders; the depth is the study's."""
    data: Folder = ""
    """Image folder; needed unless --dry-run."""
    depths: Annotated[tuple[int, ...], _numbers("depths")] = (12, 24, 36, 48)
    """Encoder blocks; a preset's taps are spread evenly at depths that are not its own."""
    stages: Annotated[tuple[int, ...], _numbers("stages")] = (1, 2, 4)
    """Pipeline stages; one stage (data parallelism with ZeRO-2) is the baseline and always in."""
    schedules: Names = (BASELINE, DEFAULT)
    """Of gpipe, 1f1b, dib, dib_w; one stage has nothing to order and runs dib."""
    steps: int = 30
    """Optimizer steps of a cell."""
    warmup_steps: int = 10
    """First steps of a cell, which are not timed."""
    repeats: int = 1
    """Runs of every cell; every other repeat goes through the cells in reverse order."""
    microbatch_size: int | None = None
    """B, images per micro-batch and replica (default: the preset's)."""
    global_batch: int | None = None
    """G, images per step of every cell (default: the preset's, or B per process)."""
    nodes: int = 1
    """Machines; more than one needs --hostfile."""
    gpus_per_node: int = 0
    """Processes on each (default: the machine's GPUs, or the largest of --stages)."""
    gpu: str = "a100-80g"
    """Predict for v100-16g, v100-32g, a100-40g, a100-80g, h100-80g or h200-141g."""
    network: str = "edr"
    """Predict for 10gbe, 25gbe, 100gbe, edr, hdr, 8xhdr, ndr, 8xndr or Gbit/s between nodes."""
    hostfile: File = ""
    """DeepSpeed's list of machines, see launcher/hostfile.example."""
    evaluate: Annotated[
        tuple[str, ...],
        comma_separated(
            lambda text: tuple(word.strip() for word in text.split(",")), "NAME [FLAGS],..."
        ),
    ] = ()
    """Of knn, linear, linear-sgd, attentive, finetune, each with its flags, after each cell of one
    stage; every repeat then has a seed of its own."""
    beside: Names = ()
    """Folders of other studies whose accuracies are compared and drawn too."""
    dry_run: bool = False
    """Predict only; start nothing."""
    slurm: bool = False
    """Submit all runs as one array job, a run per task; --collect writes the tables."""
    sbatch: Annotated[
        tuple[str, ...],
        comma_separated(
            lambda text: tuple(word.strip() for word in text.split(",")), "NAME=VALUE,..."
        ),
    ] = ()
    """Options of the array job, as partition=gpu,time=4:00:00,gpus-per-node=8."""
    only: str = ""
    """Run this one alone, as a task of the array job does."""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """After `--`: flags of pretrain for every cell, as `-- --blr 1e-3`."""

    @model_validator(mode="after")
    def _check(self) -> StudyArguments:
        if not (self.output or self.status or self.collect):
            raise ValueError("output: missing; give --output")
        for key in ("steps", "repeats", "nodes", "microbatch_size", "global_batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: must be positive")
        for key in ("depths", "stages"):
            if min(getattr(self, key)) < 1:
                raise ValueError(f"{key}={min(getattr(self, key))}: must be positive")
        if self.gpus_per_node < 0:
            raise ValueError(f"gpus_per_node={self.gpus_per_node}: must not be negative")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}: must be less than steps={self.steps}"
            )
        for name in self.schedules:
            if name not in trainable_schedules():
                known = ", ".join(trainable_schedules())
                raise ValueError(f"schedules={name}: unknown; use {known}")
        names = [evaluation.split(" ")[0] for evaluation in self.evaluate]
        for name in names:
            if name not in EVALUATIONS or names.count(name) > 1:
                known = ", ".join(EVALUATIONS)
                raise ValueError(f"evaluate={name}: must be one of {known}, each once")
        for folder in self.beside:
            if not (Path(folder) / "accuracy.json").is_file():
                raise ValueError(f"beside={folder}: holds no accuracy.json; evaluate it first")
        lookup("gpu", self.gpu, GPUS)
        network_gbytes(self.network)
        for word in self.flags:
            flag = word.split("=")[0].replace("_", "-")
            if flag in _TAKEN or (self.evaluate and flag in ("--seed", "--save-every")):
                raise ValueError(f"{flag}: is set by the study's own flags, those before `--`")
        if self.flags and not self.flags[0].startswith("--"):
            raise ValueError(f"{self.flags[0]}: unknown word; flags of pretrain come after `--`")
        return self

    @property
    def processes(self) -> int:
        """Of every cell."""
        return self.nodes * self.gpus_per_node

    @property
    def cluster(self) -> Cluster:
        """What predictions are for."""
        return Cluster(self.nodes, self.gpus_per_node, GPUS[self.gpu], network_gbytes(self.network))


def resolve(args: StudyArguments, num_gpus: int) -> StudyArguments:
    """Fill in what the preset and a machine with `num_gpus` decide; UserError for a mistake."""
    preset = load_preset(args.preset)
    if not args.data and not args.dry_run:
        raise UserError("data: missing; give an image folder, or --dry-run to predict only")
    if args.nodes > 1 and not (args.hostfile or args.slurm or args.only or args.dry_run):
        raise UserError(f"nodes={args.nodes}: need --hostfile FILE; see launcher/hostfile.example")
    per_node = args.gpus_per_node or num_gpus or max(args.stages)
    size = args.microbatch_size or preset.microbatch_size
    batch = args.global_batch or preset.global_batch or size * per_node * args.nodes
    changes = {"gpus_per_node": per_node, "microbatch_size": size, "global_batch": batch}
    return args.replace(**changes)


def read_results(path: Path) -> dict[str, Any]:
    """What a study has written; UserError if its parts are not there."""
    content = read_json(path)
    for key in ("settings", "environment"):
        if not isinstance(content.get(key), dict):
            raise UserError(f"{path}: {key}: missing; it is no study's, choose another --output")
    return content


def check_folder(args: StudyArguments) -> StudyArguments:
    """The settings to go on with in the study's folder; UserError if it holds another study."""
    folder = Path(args.output)
    saved = folder / RESULTS
    if not saved.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output={folder}: holds other files; choose an empty folder")
        return args
    if not (folder / RUNS).is_dir():  # predictions only
        return args
    theirs = read_results(saved)["settings"]
    if args.dry_run:  # draws the tables again
        args = args.replace(data=theirs.get("data", ""))
    for key, value in args.model_dump(mode="json").items():
        # More may be evaluated of runs that kept what it takes; depths decide what that is.
        if key == "evaluate" and bool(value) == bool(theirs.get(key)):
            continue
        if key == "depths" and args.evaluate and min(value) != min(theirs[key]):
            raise UserError(
                f"depths={min(value)}: the shallowest, {min(theirs[key])}, is what equal FLOPs "
                "are measured by; choose another --output"
            )
        if key not in _FREE and theirs.get(key) != value:
            raise UserError(
                f"{key}={value}: {folder} holds a study with {key}={theirs.get(key)}; "
                "choose another --output"
            )
    return args


def saved_arguments(folder: str) -> StudyArguments:
    """What the study in a folder was asked to do; UserError if it holds none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: is no study (there is no such folder); check the path")
    settings = read_results(Path(folder) / RESULTS)["settings"]
    known = {key: value for key, value in settings.items() if key in StudyArguments.model_fields}
    return StudyArguments(
        **(known | {"output": folder, "only": "", "slurm": False, "dry_run": False})
    )


def command(args: StudyArguments) -> str:
    """The line that asks for these settings."""
    words = ["deepmim-scale", "study"]
    for key, field in StudyArguments.model_fields.items():
        value = getattr(args, key)
        if key in ("flags", "slurm", "sbatch", "only") or value == field.default:
            continue
        words.append(f"--{key.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join([*words, *(["--", *args.flags] if args.flags else [])])
