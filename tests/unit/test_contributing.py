"""Every example of CONTRIBUTING.md is a program that runs and keeps what it asserts."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
SECTIONS = ["an objective", "a method", "a schedule", "a data source", "a kernel"]
# One process for all, since torch is imported once; files, since Triton reads a kernel's source.
RUN = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path)
    print("ran", path)
"""


def examples() -> dict[str, str]:
    """Section `Add ...` -> its Python example."""
    found = {}
    for section in PAGE.read_text().split("\n## Add ")[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        title = section.splitlines()[0]
        assert len(blocks) == 1, f"{title}: one complete example, not {len(blocks)}"
        found[title] = blocks[0]
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What running all examples in one process says."""
    folder = tmp_path_factory.mktemp("examples")
    paths = []
    for title, code in examples().items():
        paths.append(folder / f"{title.replace(' ', '_')}.py")
        paths[-1].write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
        check=False,
    )
    return done.stdout + done.stderr


def test_the_page_has_its_sections() -> None:
    assert list(examples()) == SECTIONS


@pytest.mark.parametrize("title", SECTIONS)
def test_example_runs(title: str, said: str) -> None:
    assert f"{title.replace(' ', '_')}.py\n" in "".join(
        line + "\n" for line in said.splitlines() if line.startswith("ran ")
    ), said


def test_files_that_the_steps_name_exist() -> None:
    root = PAGE.parent
    paths = re.findall(r"`((?:deepmim_scale|tests|kernels|benchmarks)/[\w/.]+)`", PAGE.read_text())
    assert len(paths) > 15
    missing = [path for path in paths if "NAME" not in path and not (root / path).exists()]
    assert not missing


def test_modules_that_the_changelog_renames() -> None:
    """Each new place exists; each old one is gone."""
    page = (PAGE.parent / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| `(deepmim_scale[\w.]+)` \| `(deepmim_scale[\w.]+)` \|$", page, re.M)
    assert len(rows) > 15

    def exists(place: str) -> bool:
        """Whether a module, or a name within one, can be imported."""
        try:
            importlib.import_module(place)
        except ImportError:
            module, _, name = place.rpartition(".")
            return module.count(".") > 0 and exists(module) and hasattr(sys.modules[module], name)
        return True

    assert [new for _, new in rows if not exists(new)] == []
    assert [old for old, _ in rows if exists(old)] == []
