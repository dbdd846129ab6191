"""Command line of the evaluations: `deepmim-scale evaluate digits RUN`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from deepmim_scale.config import Frozen


class DigitsArguments(Frozen):
    """Probe a run's features on scikit-learn's digits (100 labels, 5 draws)."""

    run: tyro.conf.Positional[str]
    """Folder of a run with 32-pixel input."""
    json_file: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the table (default RUN/digits.json)."""


def run_digits(arguments: DigitsArguments) -> None:
    """Print the table with the best of each kind, and save it as JSON."""
    from deepmim_scale.train.run_folder import load_run_config

    load_run_config(arguments.run)
    from deepmim_scale.evaluate.digits import NUM_DRAWS, NUM_LABELS, probe_run, table

    rows = probe_run(arguments.run)
    print(f"digits, {NUM_LABELS} labels, {NUM_DRAWS} draws, accuracy in % (mean +- std)")
    print(table(rows))
    for encoder, title in (("-", "raw pixels"), ("untrained", "untrained"), ("trained", "trained")):
        best = max((row for row in rows if row.encoder == encoder), key=lambda row: row.mean)
        print(f"best {title}: {100 * best.mean:.1f} ({best.features}, {best.pool}, {best.probe})")
    output = Path(arguments.json_file or Path(arguments.run) / "digits.json")
    output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
