"""Fits rates to traced runs of some depths and predicts the others: seconds per instruction.

    python benchmarks/calibration.py --fit 6 24 --predict 12 36

Every depth is one run in one process on the sample set, `deepmim-scale` starting it with `--trace`.
Runs of all depths take turns, several times, so that a slow moment hits all; the median of a
depth's traces counts. Ends with exit code 1 when a depth's step is predicted more than 5 % wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deepmim_scale.pipeline.ir import Kind
from deepmim_scale.plan.calibrate import Sample, fit, samples_of, traces_of

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.05
STEP = 4
# Narrow enough for a CPU, with ViT-B's 196 patches.
MODEL = [
    *[
        "--preset",
        "debug",
        "--taps",
        "even",
        "--img-size",
        "112",
        "--patch-size",
        "8",
        "--embed-dim",
        "128",
    ],
    *["--num-heads", "4", "--decoder-embed-dim", "64", "--decoder-num-heads", "2"],
    *["--decoder-depth", "2", "--microbatch-size", "4", "--microbatches", "8"],
    *["--validate-every", "0", "--save-every", "0", "--warmup-epochs", "0"],
]


def trace_run(depth: int, data: str, run: Path) -> list[Sample]:
    """The medians of one traced step of a fresh run."""
    words = ["--depth", str(depth), "--data", data, "--output", str(run), "--resume", "never"]
    words += ["--steps", str(STEP), "--trace", str(STEP), "--global-batch", "32"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher/pretrain.py"), *MODEL, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    config, traces = traces_of(str(run))
    return samples_of(traces[0], config)


def medians(repeats: list[list[Sample]]) -> dict[Kind, Sample]:
    """By kind, of several runs of one depth."""
    found: dict[Kind, list[Sample]] = defaultdict(list)
    for samples in repeats:
        for sample in samples:
            found[sample.kind].append(sample)
    return {
        kind: Sample(kind, some[0].split, some[0].features, median(s.seconds for s in some))
        for kind, some in found.items()
    }


def main() -> int:
    """Trace, fit, predict, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", nargs="+", type=int, default=[6, 24])
    parser.add_argument("--predict", nargs="+", type=int, default=[12, 36])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    depths = sorted({*args.fit, *args.predict})
    runs: dict[int, list[list[Sample]]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        data = f"{folder}/samples"
        subprocess.run(["deepmim-scale", "data", "samples", data], check=True, capture_output=True)
        for repeat in range(args.repeats):
            for depth in depths:
                runs[depth].append(trace_run(depth, data, Path(folder) / f"d{depth}_r{repeat}"))
    measured = {depth: medians(repeats) for depth, repeats in runs.items()}
    calibration = fit([s for depth in args.fit for s in measured[depth].values()])
    print(f"torch {torch.__version__}, one process, load {os.getloadavg()[0]:.1f}")
    print("| depth | instruction | measured ms | predicted ms | error |")
    print("|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    worst = 0.0
    for depth in depths:
        pairs = {
            kind: (1e3 * s.seconds, 1e3 * calibration.seconds(kind, s.split, s.features))
            for kind, s in measured[depth].items()
        }
        sums = tuple(map(sum, zip(*pairs.values(), strict=True)))
        for kind, (found, expected) in {**pairs, "all": sums}.items():
            error = expected / found - 1
            print(f"| {depth} | {kind} | {found:.2f} | {expected:.2f} | {error:+.1%} |")
            held_out = depth not in args.fit
            rows.append(
                {
                    "depth": depth,
                    "instruction": kind,
                    "measured_ms": found,
                    "predicted_ms": expected,
                    "held_out": held_out,
                }
            )
            if held_out and kind == "all":
                worst = max(worst, abs(error))
    print(f"largest error of a held-out depth: {worst:.1%}")
    if args.json:
        Path(args.json).write_text(json.dumps({"held_out_error": worst, "rows": rows}, indent=1))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
