"""The tree keeps its shape: imports go one way, files stay short, checks run without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deepmim_scale"
# A module may import from its own layer and from those below it.
LAYERS = {
    "errors": 0,
    "methods": 1,
    "config": 2,
    "presets": 3,
    "arguments": 4,
    "ds_config": 5,
    "pipeline": 6,
    "plan": 7,
    "images": 8,
    "batch": 8,
    "models": 9,
    "objectives": 10,
    "data": 11,
    "runs": 11,
    "parallel": 12,
    "checkpoint": 13,
    "train": 14,
    "evaluate": 15,
    "analysis": 15,
    "study": 15,
    "cli": 16,
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
# What --help and every check of a user's input run through.
WITHOUT_TORCH = [
    "config",
    "presets",
    "arguments",
    "ds_config",
    "cli",
    "runs.folder",
    "train.pretrain",
    "plan.cost",
    "plan.hardware",
    "analysis.commands",
    "evaluate.commands",
    "data.commands",
    "checkpoint.commands",
    "evaluate.classes",
    "data.manifest",
    "data.open_source",
    "data.sample_plan",
    "study.cells",
    "study.commands",
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imported(path):
        if name.startswith("deepmim_scale."):
            target = name.split(".")[1]
            assert LAYERS[target] <= LAYERS[parts[0]], f"{path.name} imports {name}"


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels" / "deepmim_kernels").rglob("*.py"):
        assert not any(name.startswith("deepmim_scale") for name in imported(path)), path


def test_folders_that_must_not_be_packages() -> None:
    for folder in ("kernels", "launcher", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_files_are_short() -> None:
    files = [*SOURCES, *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    long = {path.name: length for path, length in lengths.items() if length > 430}
    assert not long
    assert sorted(lengths.values())[len(lengths) // 2] < 200


def test_checks_run_without_torch() -> None:
    lines = [f"import deepmim_scale.{name}" for name in WITHOUT_TORCH]
    code = "; ".join(["import sys", *lines, "sys.exit('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, f"torch was imported: {done.stderr.decode()}"


def test_deepspeed_is_touched_in_one_file() -> None:
    users = [
        path for path in SOURCES if any(n.split(".")[0] == "deepspeed" for n in imported(path))
    ]
    assert [path.name for path in users] == ["zero.py"]
