"""`deepmim-scale doctor`, or `launcher/doctor.py` under any launcher: a table with remedies."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from deepmim_scale.arguments import parse, parse_run, run_command, writable
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.plan.hardware import network_gbytes
from deepmim_scale.ranks import adopt_ranks, check_ranks
from deepmim_scale.settings import Folder, FrozenConfig, PositiveInt

if TYPE_CHECKING:
    import torch

    from deepmim_scale.doctor.findings import Finding

NUM_STEPS = 3
MAX_STAGES = 8


class DoctorArguments(FrozenConfig):
    """Check machines and their network before the first run."""

    preset: str = "debug"
    """Whose need of images is compared; three steps are trained with the preset debug."""
    stages: PositiveInt | None = None
    """Stages of the pipelines that are checked (default: as many as divide the processes, <= 8)."""
    network: str = ""
    """What to expect between nodes: a name as in `plan`, or Gbit/s (default: nothing)."""
    output: Folder = "runs/doctor"
    """Folder to check; the runs' should be beside it."""
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    """Longest wait for another process, s."""
    json_path: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the table as JSON."""
    local_rank: Annotated[int, tyro.conf.arg(help="given by the deepspeed launcher")] = 0


def run_doctor(args: DoctorArguments) -> None:
    """Print the table; exit code 1 if something is to be done."""
    network = network_gbytes(args.network) if args.network else 0.0
    if args.json_path:
        writable("json", args.json_path)
    check_ranks()
    import torch
    import torch.distributed as dist

    from deepmim_scale.doctor.findings import merge, table, to_json
    from deepmim_scale.doctor.together import gathered
    from deepmim_scale.parallel import failure, zero
    from deepmim_scale.runs.environment import describe_environment

    failure.limit_waits(args.timeout)
    try:
        device = zero.init_processes(args.timeout)
        findings = [*_alone(args, device, merge, gathered), *_together(args, device, network)]
    except (UserError, RunFailure):
        raise
    except Exception as error:  # of a peer, most likely
        failure.leave(error, None)
    if dist.get_rank() == 0:
        print(table(findings), flush=True)
        if args.json_path:
            content = to_json(findings, describe_environment())
            Path(args.json_path).write_text(json.dumps(content, indent=1) + "\n")
    bad = any(finding.state == "bad" for finding in findings)
    torch.distributed.destroy_process_group()
    if bad:
        sys.exit(1)


def _alone(
    args: DoctorArguments,
    device: torch.device,
    merge: Callable[[Sequence[tuple[str, Sequence[Finding]]]], list[Finding]],
    gathered: Callable[[object], list[tuple[str, list[Finding]]]],
) -> list[Finding]:
    """What every rank checks for itself."""
    from deepmim_scale.doctor import machine

    num_hosts = len(set(gathered(socket.gethostname())))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    mine = [
        machine.check_wheel(device),
        machine.check_driver(device),
        machine.check_dali(device),
        machine.check_triton(device),
        machine.check_compile(device),
        machine.check_jpeg(device, args.preset, num_local),
        machine.check_shared_memory(),
        machine.check_name(num_hosts),
        machine.check_launcher(num_hosts),
    ]
    return merge(gathered((socket.gethostname(), mine)))


def _together(args: DoctorArguments, device: torch.device, network: float) -> list[Finding]:
    """What all ranks check with each other, the network after what it rests on."""
    import torch.distributed as dist

    from deepmim_scale.doctor import together

    world = dist.get_world_size()
    stages = args.stages or max(n for n in range(1, MAX_STAGES + 1) if world % n == 0)
    together.divides(stages)
    findings = [
        together.check_versions(),
        together.check_threads(),
        together.check_clocks(),
        together.check_all_reduce(device, network),
        together.check_channels(stages, device, args.timeout, network),
        together.check_output(Path(args.output)),
    ]
    shared = findings[-1].state == "ok"
    return [*findings, _train(args, device, stages) if shared else _untrained()]


def _untrained() -> Finding:
    from deepmim_scale.doctor.findings import not_here

    return not_here("training", "needs the output folder")


def _train(args: DoctorArguments, device: torch.device, stages: int) -> Finding:
    """Three real steps in these processes, with images that every rank draws for itself."""
    import torch.distributed as dist

    from deepmim_scale.doctor.findings import bad, ok
    from deepmim_scale.doctor.pictures import write_pictures
    from deepmim_scale.runs.folder import read_metrics
    from deepmim_scale.train.prepare import prepare
    from deepmim_scale.train.trainer import Trainer

    world = dist.get_world_size()
    run = Path(args.output) / "training"
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        if dist.get_rank() == 0:
            shutil.rmtree(run, ignore_errors=True)
        dist.barrier()
        words = ["--preset", "debug", "--data", folder, "--output", str(run)]
        words += ["--steps", str(NUM_STEPS), "--warmup-epochs", "0", "--stages", str(stages)]
        words += ["--microbatch-size", "2", "--microbatches", str(stages), "--save-every", "0"]
        words += ["--validate-every", "0", "--timeout", str(args.timeout), "--print-every", "1000"]
        with contextlib.redirect_stdout(io.StringIO()):  # the table is what is asked for
            Trainer(prepare(parse_run(words, prog="doctor")), device).run()
    dist.barrier()
    rows = read_metrics(run)
    text = f"{len(rows)} steps on {world} ranks, {rows[-1]['seconds']:.2f} s for the last one"
    if len(rows) == NUM_STEPS and all(row["loss"] is not None for row in rows):
        return ok("training", f"{text}, loss {rows[-1]['loss']:.3f}")
    return bad("training", text, f"look into {run}/metrics.jsonl")


def main(argv: Sequence[str] | None = None, prog: str = "deepmim-scale doctor") -> None:
    """Entry of `launcher/doctor.py` and `deepmim-scale doctor`."""
    words = sys.argv[1:] if argv is None else argv
    adopt_ranks()
    run_command(lambda: run_doctor(parse(DoctorArguments, words, prog=prog)))


if __name__ == "__main__":
    main()
