"""Runs the Triton tests in `ops/` under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).parent / "ops"


def run(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(OPS), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=OPS.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="ops/ runs on the GPU itself")


@needs_no_gpu
def test_interpreted_ops() -> None:
    run()


@needs_no_gpu
@pytest.mark.soak
def test_interpreted_ops_soak() -> None:
    run("-m", "soak")
