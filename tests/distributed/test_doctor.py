"""The doctor on one process and under a launcher: a table, remedies, and three real steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from free_port import free_port

from deepmim_scale.doctor.findings import bad, merge, not_here, ok, same_everywhere, table

ROOT = Path(__file__).resolve().parents[2]
GPU_ROWS = ("torch wheel", "driver", "DALI mixed", "Triton", "compile")


def doctor(folder: Path, processes: int, *words: str, **environment: str) -> Any:
    command = [sys.executable, str(ROOT / "launcher" / "doctor.py")]
    if processes > 1:
        torchrun = ["torchrun", "--nproc_per_node", str(processes), "--master_port"]
        command = [*torchrun, str(free_port()), *command[1:]]
    output = ["--output", str(folder), "--json", str(folder / "doctor.json")]
    return subprocess.run(
        [*command, *output, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        timeout=600,
        check=False,
    )


def findings(folder: Path) -> dict[str, dict[str, str]]:
    content = json.loads((folder / "doctor.json").read_text())
    return {finding["check"]: finding for finding in content["findings"]}


def test_one_process(tmp_path: Path) -> None:
    done = doctor(tmp_path, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(tmp_path)
    assert all(found[name]["found"] == "no GPU here" for name in GPU_ROWS)
    assert found["training"]["found"].startswith("3 steps on 1 ranks")
    assert len(done.stdout.splitlines()) == len(found), "the table and nothing else"
    assert not list(tmp_path.glob(".doctor"))


def test_two_processes_with_something_to_mend(tmp_path: Path) -> None:
    """A network that no loopback reaches, and torchrun without the setting for restarts."""
    words = ("--network", "1000000", "--stages", "2")
    done = doctor(tmp_path, 2, *words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    assert done.returncode == 1, done.stdout + done.stderr
    found = findings(tmp_path)
    for name in ("all-reduce", "channels of 2 stages", "launcher"):
        assert found[name]["state"] == "bad", found[name]
        assert found[name]["remedy"] in done.stdout
    assert found["training"]["found"].startswith("3 steps on 2 ranks")
    assert found["output folder"]["state"] == "ok"
    mistake = doctor(tmp_path, 2, "--stages", "3")
    assert "error: stages=3: must divide the 2 processes" in mistake.stderr


def test_merging() -> None:
    ranks = [("a", [ok("x", "1"), not_here("y")]), ("b", [bad("x", "2", "mend it"), not_here("y")])]
    merged = merge(ranks)
    assert merged == [bad("x", "b: 2", "mend it"), not_here("y")]
    assert table(merged).splitlines() == ["x  BAD  b: 2; mend it", "y  -    no GPU here"]
    same = same_everywhere("versions", [("a", "1"), ("b", "1")], "install")
    assert same == ok("versions", "1")
    other = same_everywhere("versions", [("a", "1"), ("b", "2")], "install")
    assert other == bad("versions", "a: 1; b: 2", "install")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = doctor(tmp_path, 1, "--output", str(tmp_path / "file" / "runs"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert findings(tmp_path)["output folder"]["state"] == "bad"
    assert findings(tmp_path)["training"]["found"] == "needs the output folder"
