"""What the release says about itself agrees, and the files of the repository's door can be read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import deepmim_scale

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOOR = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=]", requirement)[0].replace("-", "_").lower()


@pytest.mark.parametrize("path", DOOR, ids=lambda path: path.name)
def test_the_door_can_be_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_there_is_one_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == (
        deepmim_scale.__version__
    )
    assert deepmim_scale.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_hooks_tools_come_with_the_development_extra() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    dev = {name_of(requirement) for requirement in PROJECT["optional-dependencies"]["dev"]}
    for hook in repository["hooks"]:
        assert hook["language"] == "system", "hooks work without internet"
        assert hook["entry"].split()[0] in dev


def test_workflows_install_extras_that_exist() -> None:
    for path in (ROOT / ".github" / "workflows").iterdir():
        for extras in re.findall(r"-e '\.\[([\w,-]+)\]'", path.read_text()):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_launchers_in_tests_get_free_ports() -> None:
    """A fixed port makes two copies of the suite collide."""
    fixed = re.compile(r"""master_port["'=, ]+\d|tcp://\S+:\d""")
    found = [path for path in (ROOT / "tests").rglob("*.py") if fixed.search(path.read_text())]
    assert not found
