"""What the compiler makes of the kernels, for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepmim_kernels._dispatch import TRITON_AVAILABLE

pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="triton is not installed")

# A few more registers than Triton 3.9 gave any variant on any architecture. Far beyond 64, too
# few threads fit on an SM to keep its memory busy.
MAX_REGISTERS = {"onepass p32": 72, "backward d512": 80}
MAX_REGISTERS_ELSEWHERE = 52
# 128-bit accesses that every lane must make: predictions (and teacher or pair) in, gradient out.
VECTORS = {
    "onepass p16 packed uint8": (1, 1),
    "onepass p16 packed fp32 image": (1, 1),
    "onepass p16 dense": (1, 2),
    "onepass p16 pair hybrid": (3, 1),
    "gradient only p16": (1, 1),
    "packed d512": (2, 1),
    "dense d512": (2, 2),
    "forward d512": (2, 1),
    "backward d512": (1, 1),
}


def compile_all(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of the report, made in a process without the interpreter and with an empty cache."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    target = tmp_path / "aot.json"
    subprocess.run(
        [sys.executable, "-m", "deepmim_kernels.aot", "--json", str(target), *arguments],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(target.read_text())


def check(rows: list[dict[str, Any]]) -> None:
    assert rows, "nothing was compiled"
    for row in rows:
        assert row["spills"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= 48 * 1024, row
        assert row["registers"] <= MAX_REGISTERS.get(row["variant"], MAX_REGISTERS_ELSEWHERE), row
        loads, stores = VECTORS.get(row["variant"], (0, 0))
        assert row["loads"].get("128", 0) >= loads, row
        assert row["stores"].get("128", 0) >= stores, row


def test_gate(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "--arch", "70", "90")
    assert {row["arch"] for row in rows} == {70, 90}
    assert {row["variant"] for row in rows} >= VECTORS.keys()
    check(rows)


@pytest.mark.soak
def test_gate_on_every_architecture(tmp_path: Path) -> None:
    rows = compile_all(tmp_path)
    assert {row["arch"] for row in rows} == {70, 75, 80, 90, 100}
    check(rows)


def test_refuses_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deepmim_kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == "TRITON_INTERPRET=1 replaces the compiler; unset it\n"
