"""Command line of `deepmim-scale replay`. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from deepmim_scale.arguments import writable
from deepmim_scale.settings import File, FrozenConfig, shown_as


class ReplayArguments(FrozenConfig):
    """Execute a step of a run again on one process, to the bit, from the checkpoint before it."""

    run: Annotated[tyro.conf.Positional[str], shown_as("RUN")]
    """Folder of a run of pre-training; nothing in it is changed."""
    step: Annotated[int, Field(gt=0, lt=10**9)]
    """The step, numbered from 1 as in metrics.jsonl."""
    json_file: Annotated[File, tyro.conf.arg(name="json")] = ""
    """File for what was found."""


def run_replay(arguments: ReplayArguments) -> None:
    """Print what the step computes, and whether it is what the run recorded."""
    from deepmim_scale.train.replay import replay

    target = writable("json", arguments.json_file) if arguments.json_file else None
    found = replay(Path(arguments.run), arguments.step)
    losses = " ".join(f"{name} {value:.6f}" for name, value in found["losses"].items())
    skipped = "" if found["applied"] else ", skipped: gradients not finite"
    print(f"step {found['step']} from {found['from']}: loss {found['loss']} ({losses}){skipped}")
    print(f"gradient norms: {' '.join(f'{n} {x:.4g}' for n, x in found['grad_norms'].items())}")
    for line in found["microbatches"]:
        print(line)
    verdicts = {True: "equal bits", False: "another loss", None: "no row of that step"}
    print(f"recorded: {found['recorded']}, {verdicts[found['equal']]}")
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
