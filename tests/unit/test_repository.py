"""The tree keeps its shape: imports go one way, files stay short, checks run without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepmim_scale.methods import METHODS
from deepmim_scale.objectives import OBJECTIVES
from deepmim_scale.pipeline.registry import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deepmim_scale"
# A module may import from its own layer and from those below it, inside functions too. Imports for
# annotations alone (`if TYPE_CHECKING`) are no arrows: nothing runs through them.
ORDER = [
    ["errors", "precision", "ranks"],
    ["settings", "json_file", "image_format"],
    ["faults"],
    ["operation"],
    ["methods"],
    ["batch", "images"],
    ["objectives"],
    ["model_config"],
    ["config"],
    ["presets", "flags"],
    ["arguments"],
    ["runs"],
    ["ds_config"],
    ["pipeline"],
    ["plan"],
    ["models"],
    ["data"],
    ["parallel"],
    ["checkpoint"],
    ["train"],
    ["finetune"],
    ["doctor"],
    ["evaluate"],
    ["analysis"],
    ["study"],
    ["cli"],
]
LAYERS = {name: rank for rank, names in enumerate(ORDER) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))
# What --help and every check of a user's input run through.
WITHOUT_TORCH = [
    "config",
    "presets",
    "arguments",
    "ds_config",
    "cli",
    "runs.environment",
    "runs.folder",
    "runs.lock",
    "runs.resume",
    "runs.state",
    "train.pretrain",
    "train.replay_command",
    "finetune.command",
    "doctor.command",
    "evaluate.finetune_digits",
    "plan.cost",
    "plan.hardware",
    "plan.schedule_command",
    "methods",
    "objectives",
    "pipeline.registry",
    "analysis.commands",
    "evaluate.commands",
    "evaluate.probe_commands",
    "data.commands",
    "checkpoint.commands",
    "data.classes",
    "data.manifest",
    "data.open_source",
    "data.sample_plan",
    "study.cells",
    "study.commands",
]


def running_code(path: Path) -> Iterator[ast.AST]:
    """All nodes of a file but those under `if TYPE_CHECKING`."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        yield node
        todo.extend(
            child
            for child in ast.iter_child_nodes(node)
            if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
        )


def imported(path: Path) -> set[str]:
    """Every module that a file imports, `from package import module` spelled out."""
    names = set()
    for node in running_code(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imported(path):
        target = name.split(".")[1] if name.startswith("deepmim_scale.") else ""
        if target in LAYERS:
            assert LAYERS[target] <= LAYERS[parts[0]], f"{path.name} imports {name}"


def test_folders_are_layers_of_their_own() -> None:
    """A folder has one place in the order: no two of them import each other."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == set(LAYERS)
    shared = [names for names in ORDER if len(names) > 1]
    assert not any(set(names) & folders for names in shared), shared


# Where names of methods, targets and schedules may stand as strings.
NAMED_IN = ("methods", "objectives", "model_config.py", "config.py", "presets.py", "registry.py")
NAMES = {*METHODS, *OBJECTIVES, *SCHEDULES, "cosine"}
# Export formats are named after libraries, one of them after a method.
ALLOWED = {
    "checkpoint/commands.py": {"mae", "timm"},
    "checkpoint/export.py": {"mae", "timm"},
    "finetune/files.py": {"timm"},
    "finetune/transform.py": {"pixel"},  # a way to erase, of timm
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_stand_in_their_registries(path: Path) -> None:
    place = path.relative_to(PACKAGE)
    if place.parts[0] in NAMED_IN or place.name in NAMED_IN:
        return
    strings = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    found = strings & NAMES - ALLOWED.get(str(place), set())
    assert not found, f"{place} names {found}: ask the registry instead"


def test_the_formatter_decides() -> None:
    sources = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    mark = "# fmt: " + "skip"
    assert not [path for path in sources if mark in path.read_text()]


def test_settings_are_copied_with_checks() -> None:
    """pydantic's own copy runs no validator; `FrozenConfig.replace` does."""
    unchecked = "model_" + "copy("
    assert not [path for path in SOURCES if unchecked in path.read_text()]


def test_a_target_is_one_short_file() -> None:
    for name in ("hog", "timm_features", "ema"):
        path = PACKAGE / "objectives" / f"{name}.py"
        length = len(path.read_text().splitlines())
        print(f"{path.name}: {length} lines")
        assert length <= 80, path


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels" / "deepmim_kernels").rglob("*.py"):
        assert not any(name.startswith("deepmim_scale") for name in imported(path)), path


def test_folders_that_must_not_be_packages() -> None:
    for folder in ("kernels", "launcher", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_files_are_short() -> None:
    files = [*SOURCES, *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    long = {path.name: length for path, length in lengths.items() if length > 400}
    assert not long
    assert sorted(lengths.values())[len(lengths) // 2] < 200


def test_checks_run_without_torch() -> None:
    lines = [f"import deepmim_scale.{name}" for name in WITHOUT_TORCH]
    code = "; ".join(["import sys", *lines, "sys.exit('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, f"torch was imported: {done.stderr.decode()}"


def test_deepspeed_is_touched_in_two_files() -> None:
    users = [
        path for path in SOURCES if any(n.split(".")[0] == "deepspeed" for n in imported(path))
    ]
    assert [path.name for path in users] == ["zero.py", "zero_state.py"]
