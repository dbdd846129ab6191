"""What `benchmarks/gpu_check.py --stage 4` times is a step that trains, shown on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
sys.path.insert(0, "benchmarks")
import gpu_check
step, sets = gpu_check.training_step("debug", batch=4, backend="torch")
print(json.dumps([step(sets[0]).item() for _ in range(6)]))
"""


def test_the_timed_step_trains() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = json.loads(result.stdout.splitlines()[-1])
    # The same images again and again: every update must lower the loss on them.
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    # Four decoders, each about the variance 1 of the normalized patches before training.
    assert losses[0] == pytest.approx(4, rel=0.5)
