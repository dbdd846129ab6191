"""What users install: an sdist that holds its tests, and from it a wheel that trains by itself.

The wheel goes into an empty environment that sees the installed dependencies, but not this clone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from free_port import free_port

import deepmim_scale
from deepmim_scale.runs.folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
# What a clone holds besides its sources: environments, caches, results.
AT_THE_ROOT = {".git", ".venv", "build", "dist", "runs", "samples", ".coverage"}
ANYWHERE = shutil.ignore_patterns("*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def finished(command: list[str], folder: Path) -> str:
    """What a command says; it runs outside of the clone and does not see it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a clone has them: building leaves nothing in the folder under test."""
    folder = tmp_path_factory.mktemp("clone") / "sources"

    def is_no_source(path: str, names: list[str]) -> set[str]:
        return ANYWHERE(path, names) | (AT_THE_ROOT if Path(path) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=is_no_source)
    return folder


@pytest.fixture(scope="module")
def unpacked(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    finished([sys.executable, "-c", BUILD.format(kind="sdist"), str(folder)], clone)
    (archive,) = folder.iterdir()
    assert archive.name == f"deepmim_scale-{deepmim_scale.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def python(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python of an environment with the wheel, above the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    finished([sys.executable, "-c", BUILD.format(kind="wheel"), str(folder)], unpacked)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    finished([sys.executable, "-m", "venv", "--without-pip", str(environment)], folder)
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    finished([*pip, str(wheel)], folder)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(finished([python, "-c", where], folder).strip())
    # Folders named by a .pth are searched last, and their own .pth files are not read: an editable
    # installation of this clone stays unseen.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(folders)) + "\n")
    return python


def test_the_sdist_holds_all_that_a_clone_holds(clone: Path, unpacked: Path) -> None:
    def names(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    missing = names(clone) - names(unpacked)
    assert {name for name in missing if ".egg-info/" not in name and ".ci/" not in name} == set()


def test_the_wheel_is_found_in_its_own_place(python: str, tmp_path: Path) -> None:
    code = (
        "from importlib import metadata, util;"
        "names = ['deepmim_scale', 'deepmim_kernels'];"
        "print(*(util.find_spec(name).origin for name in names), sep='\\n');"
        "print(metadata.version('deepmim_scale'))"
    )
    *files, version = finished([python, "-c", code], tmp_path).splitlines()
    for file in map(Path, files):
        assert file.is_relative_to(Path(python).parents[1]), file
        assert (file.parent / "py.typed").exists(), "type checkers read the annotations"
    assert version == deepmim_scale.__version__


def test_the_wheel_trains_under_deepspeed(python: str, tmp_path: Path) -> None:
    """With the DeepSpeed JSON that lies in the wheel: by default, and read by its name."""
    command = str(Path(python).with_name("deepmim-scale"))
    finished([command, "data", "samples", "pictures"], tmp_path)
    deepspeed = os.path.join(sysconfig.get_path("scripts"), "deepspeed")
    launcher = [python, deepspeed, "--num_accelerators", "1", "--master_port", str(free_port())]
    words = ["--preset", "debug", "--data", "pictures", "--steps", "2", "--warmup-epochs", "0"]
    words += ["--microbatch-size", "2", "--validate-every", "0", "--output", "run"]
    finished([*launcher, "--module", "deepmim_scale.train.pretrain", *words], tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    code = "from deepmim_scale.ds_config import load_ds_config as load; load('a100_bf16.json')"
    finished([python, "-c", code], tmp_path)
