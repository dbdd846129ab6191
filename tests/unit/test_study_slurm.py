"""A study as an array job: its script, its tasks and what --status says; no Slurm is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from unit.test_study import SMALL, write_run

from deepmim_scale.arguments import parse
from deepmim_scale.cli import main
from deepmim_scale.errors import STOPPED, UserError
from deepmim_scale.study import runner
from deepmim_scale.study.cells import build_cells
from deepmim_scale.study.settings import StudyArguments, resolve

# Prints as sbatch does, and keeps the script.
SBATCH = '#!/bin/sh\ncp "$2" "$(dirname "$0")/submitted"\necho 41\n'
RUNS = ["d4_p1_dib_r0", "d4_p2_1f1b_r0", "d4_p2_dib_r0"]


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_submission(tmp_path: Path, bin_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "--output", str(tmp_path / "study"), *SMALL, "--depths", "4"]
    write_run(tmp_path / "study", RUNS[1], [10.0] * 12, [1.0] * 12)
    (tmp_path / "study" / "study.json").write_text(
        json.dumps({"settings": settings(tmp_path, words), "environment": {}})
    )
    main([*words, "--slurm", "--sbatch", "partition=gpu,time=4:00:00"])
    assert "2 runs, array job 41" in capsys.readouterr().out
    script = (bin_folder / "submitted").read_text()
    assert f"runs=({RUNS[0]} {RUNS[2]})" in script, "what is done is not run again"
    assert "--array=0-1\n" in script
    assert "#SBATCH --partition=gpu\n#SBATCH --time=4:00:00\n" in script
    assert subprocess.run(["bash", "-n", bin_folder / "submitted"], check=False).returncode == 0
    line = re.search(r"^deepmim-scale (study .*) --only ", script, re.MULTILINE)
    assert line is not None
    task = parse(StudyArguments, [*line[1].split()[1:], "--only", RUNS[2]], prog="study")
    cells = {cell.run(0): cell for cell in build_cells(resolve(task, 0))}
    launched = runner.launch_command(resolve(task, 0), cells[RUNS[2]], RUNS[2])
    assert launched[:4] == ["srun", "--kill-on-bad-exit=1", "--ntasks=2", "--ntasks-per-node=2"]
    assert "slurm=True" not in script


def settings(tmp_path: Path, words: list[str]) -> dict[str, object]:
    args = resolve(parse(StudyArguments, words[1:], prog="study"), 0)
    return args.model_dump(mode="json")


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["study", "--output", str(tmp_path / "study"), *SMALL, "--slurm"])
    assert stop.value.code == 2


def test_tasks_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run fails, one is stopped and goes on with what it had, one is never started."""
    out = tmp_path / "study"
    words = ["study", "--output", str(out), *SMALL, "--depths", "4"]
    rows = [10.0] * 12, [1.0] * 12
    write_run(tmp_path / "made", RUNS[2], *rows)
    source, target = tmp_path / "made" / "runs" / RUNS[2], out / "runs" / RUNS[2]
    fails = "print('error: kernels=triton: needs a GPU')"
    four = '{"step": 4}\n' * 4
    stops = (
        f"import os, pathlib, shutil, sys; target = pathlib.Path({str(target)!r})\n"
        f"if target.is_dir(): shutil.copytree({str(source)!r}, target, dirs_exist_ok=True)\n"
        "else:\n"
        "    (target / 'checkpoints' / 'step_00000004').mkdir(parents=True)\n"
        f"    (target / 'metrics.jsonl').write_text({four!r})\n"
        f"    sys.exit({STOPPED})\n"
    )
    scripts = {RUNS[1]: f"import sys; {fails}; sys.exit(2)", RUNS[2]: stops}
    monkeypatch.setattr(
        runner, "launch_command", lambda args, cell, run: [sys.executable, "-c", scripts[run]]
    )
    main([*words, "--dry-run"])

    def task(run: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--only", run])
        return int(stop.value.code or 0)

    assert (task(RUNS[1]), task(RUNS[2])) == (2, STOPPED)
    capsys.readouterr()
    main(["study", "--status", str(out)])
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"d4_p1_dib_r0 +waiting +0/12", told[0])
    assert re.fullmatch(r"d4_p2_1f1b_r0 +failed +0/12 +kernels=triton: needs a GPU", told[1])
    assert re.fullmatch(r"d4_p2_dib_r0 +stopped +4/12", told[2])
    assert told[3] == "3 runs: 1 waiting, 1 failed, 1 stopped"
    assert task(RUNS[2]) == 0
    assert not (target / "checkpoints").exists(), "it was for going on"
    capsys.readouterr()
    main(["study", "--collect", str(out)])
    assert "3 runs: 1 waiting, 1 failed, 1 done" in capsys.readouterr().out
    table = json.loads((out / "study.json").read_text())["rows"]
    assert [row["status"] for row in table] == ["not run", "failed", "done"]
    assert task(RUNS[2]) == 0, "nothing to do"


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output: missing"):
        parse(StudyArguments, [], prog="study")
    for flag in ("--status", "--collect"):
        with pytest.raises(SystemExit) as stop:
            main(["study", flag, str(tmp_path / "none")])
        assert stop.value.code == 2
