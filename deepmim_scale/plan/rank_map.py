"""The command `deepmim-scale ranks`: which GPU of which host holds which stage of which replica."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import tyro

from deepmim_scale.arguments import load_run
from deepmim_scale.errors import UserError
from deepmim_scale.flags import given_flags
from deepmim_scale.settings import File, FrozenConfig, PositiveInt


class Place(NamedTuple):
    """One rank's."""

    rank: int
    host: str
    gpu: int
    stage: int
    replica: int


class RankMapArguments(FrozenConfig):
    """Print which GPU of which host holds which stage of which replica."""

    hostfile: File = ""
    """DeepSpeed's list of machines, see launcher/hostfile.example."""
    hosts: str = ""
    """Names of machines instead, separated by commas."""
    gpus_per_node: PositiveInt = 1
    """Processes on each; a hostfile says it itself."""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """After `--`: the flags of the run."""


def run_rank_map(args: RankMapArguments) -> None:
    """Print a line for each host and stage."""
    slots = read_hostfile(args.hostfile) if args.hostfile else {}
    names = args.hosts.split(",") if args.hosts else ["this host"]
    slots = slots or dict.fromkeys(names, args.gpus_per_node)
    given = given_flags(args.flags)
    default = load_run(given["--config"]).stages if "--config" in given else 1
    for line in describe(places(slots, int(given.get("--stages", default)))):
        print(line)


def read_hostfile(path: str) -> dict[str, int]:
    """Processes of each host, in the order of a DeepSpeed hostfile; UserError for a bad line."""
    found: dict[str, int] = {}
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"hostfile={path}: cannot be read ({error.strerror})") from None
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit():
            raise UserError(f"hostfile={path}: {line.strip()}: write each line as `node1 slots=8`")
        found[words[0]] = int(slots)
    return found


def places(slots: dict[str, int], num_stages: int) -> list[Place]:
    """Every rank's place: hosts one after another, a stage's replicas on neighboring ranks."""
    gpus = [(host, gpu) for host, count in slots.items() for gpu in range(count)]
    if not gpus or len(gpus) % num_stages:
        raise UserError(
            f"stages={num_stages}: must divide the {len(gpus)} processes; change one of the two"
        )
    replicas = len(gpus) // num_stages
    return [
        Place(rank, host, gpu, *divmod(rank, replicas)) for rank, (host, gpu) in enumerate(gpus)
    ]


def describe(found: list[Place]) -> Iterator[str]:
    """A line for the ranks of one stage on one host."""
    for (host, stage), some in groupby(found, lambda place: (place.host, place.stage)):
        part = list(some)
        gpus, replicas, ranks = (
            _span([getattr(place, key) for place in part]) for key in ("gpu", "replica", "rank")
        )
        yield f"{host}: GPU {gpus} -> stage {stage}, replica {replicas} (rank {ranks})"


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
