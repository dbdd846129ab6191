"""Whether a command may go on in a folder, who works there, and what a killed run leaves in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.presets import load_preset
from deepmim_scale.runs import lock, processes
from deepmim_scale.runs.environment import describe_environment, record_start
from deepmim_scale.runs.folder import (
    CONFIG,
    LOCK,
    METRICS,
    STARTS,
    load_run_config,
    read_metrics,
    step_folder,
    write_config,
    writing,
)
from deepmim_scale.runs.resume import check_output, finished_without_checkpoints, set_aside


def run(output: Path, **values: Any) -> RunConfig:
    return load_preset("debug").replace(output=str(output), **values)


def begun(output: Path, **values: Any) -> None:
    write_config(run(output, **values))
    write_rows(output, 1)


def write_rows(output: Path, number: int) -> None:
    rows = [{"step": step} for step in range(1, number + 1)]
    (output / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_took_no_step_may_be_replaced(tmp_path: Path) -> None:
    write_config(run(tmp_path, seed=1))
    assert not check_output(run(tmp_path, seed=2))
    begun(tmp_path, seed=1)
    assert check_output(run(tmp_path, seed=1))
    with pytest.raises(UserError, match=r"holds another run \(seed 1 -> 2\)"):
        check_output(run(tmp_path, seed=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        check_output(run(tmp_path / "other"))


def test_a_start_that_ended_before_its_configuration(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / STARTS).touch()
    assert not check_output(run(tmp_path))


def test_stages_are_free_unless_gradients_stop_at_them(tmp_path: Path) -> None:
    begun(tmp_path / "full", stages=2)
    assert check_output(run(tmp_path / "full", stages=4))
    begun(tmp_path / "local", stages=2, gradient_flow="local")
    with pytest.raises(UserError, match="stages 2 -> 4"):
        check_output(run(tmp_path / "local", stages=4, gradient_flow="local"))


FREE = {
    "loader": "torch",
    "decode": "cpu",
    "loader_threads": 7,
    "prefetch": 9,
    "on_bad": "replace",
    "print_every": 3,
    "save_every": 4,
    "keep_checkpoints": 5,
    "keep_every": 2000,
    "validate_every": 0.0,
}


@pytest.mark.parametrize("key", FREE)
def test_what_changes_no_weight_is_free(tmp_path: Path, key: str) -> None:
    begun(tmp_path)
    assert getattr(run(tmp_path), key) != FREE[key], "no change"
    assert check_output(run(tmp_path, **{key: FREE[key]}))


def test_a_field_that_is_younger_than_the_run(tmp_path: Path) -> None:
    begun(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    del content["eps"], content["model"]["norm_pix"]
    (tmp_path / CONFIG).write_text(json.dumps(content))
    assert check_output(run(tmp_path))
    with pytest.raises(UserError, match=r"eps 1e-08 -> 0\.5"):
        check_output(run(tmp_path, eps=0.5))


def test_paths_are_saved_absolute_and_compared_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").touch()
    for name in ("mae", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    paths = {
        "data": "pictures",
        "deepspeed_config": "ds.json",
        "hybrid": "runs/mae",
        "teacher_weights": "weights.pt",
    }
    config = run(Path("runs/a"), **paths)
    write_config(config)
    write_rows(tmp_path / "runs/a", 1)
    saved = load_run_config("runs/a")
    assert saved.data == str(tmp_path / "pictures")
    assert saved.output == str(tmp_path / "runs/a")
    assert saved.deepspeed_config == str(tmp_path / "ds.json")
    assert saved.model.teacher == str(tmp_path / "runs/mae")
    assert saved.teacher_weights == str(tmp_path / "weights.pt")
    assert check_output(config)
    # From another folder, through a link, and back to what an older version saved.
    (tmp_path / "link").symlink_to(tmp_path)
    assert check_output(RunConfig(**(dict(config) | {"hybrid": f"{tmp_path}/link/runs/mae"})))
    (tmp_path / "runs/a" / CONFIG).write_text(config.model_dump_json())
    assert check_output(saved)
    with pytest.raises(UserError, match=r"teacher .*runs/mae -> .*runs/other"):
        check_output(RunConfig(**(dict(config) | {"hybrid": "runs/other"})))
    tag = run(tmp_path / "b", teacher_weights="openai", teacher="local-dir:clip")
    write_config(tag)
    assert load_run_config(tag.output).teacher_weights == "openai", "a tag is no path"
    assert load_run_config(tag.output).model.teacher == f"local-dir:{tmp_path}/clip"


@pytest.mark.parametrize("end", ["", "{", '{"step": 3'])
def test_an_unfinished_last_row_is_dropped(tmp_path: Path, end: str) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n' + end)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output=.*file/run/config\.json: cannot be written"):
        write_config(run(tmp_path / "file" / "run"))


def test_from_needs_that_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"from=800: .* holds no run; check --output"):
        check_output(run(tmp_path, from_step="800"))
    begun(tmp_path)
    step_folder(tmp_path, 400).mkdir(parents=True)
    assert check_output(run(tmp_path, from_step="step_00000400"))
    assert check_output(run(tmp_path, from_step="latest"))
    with pytest.raises(UserError, match=r"from=800: .* no checkpoint of that step; choose .* 400"):
        check_output(run(tmp_path, from_step="800"))
    write_config(run(tmp_path, from_step="400"))
    assert load_run_config(tmp_path).from_step == ""


@pytest.mark.parametrize(
    ("save", "keep", "rule"),
    [
        (1000, 1500, "multiple of save_every=1000"),
        (0, 1000, "multiple of save_every=0"),
        (1000, -1000, "must not be negative"),
    ],
)
def test_checkpoints_that_would_not_be_written_cannot_be_kept(
    save: int, keep: int, rule: str
) -> None:
    with pytest.raises(UserError, match=rf"keep_every={keep}: .*{rule}"):
        RunConfig(save_every=save, keep_every=keep)
    assert RunConfig(save_every=1000, keep_every=3000).keep_every == 3000


def test_later_steps_are_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path, 0) == "", "a new run"
    write_rows(tmp_path, 7)
    for step in (2, 4, 6):
        step_folder(tmp_path, step).mkdir(parents=True)
    assert set_aside(tmp_path, 7) == "", "nothing lies after it"
    note = set_aside(tmp_path, 2)
    (aside,), (later,) = tmp_path.glob("metrics.before-*"), tmp_path.glob("checkpoints.before-*")
    assert note == (
        f"going on after step 2, 5 steps are repeated; their rows are in {aside}; "
        f"2 later checkpoints are in {later}"
    )
    assert [json.loads(line)["step"] for line in aside.read_text().splitlines()] == [3, 4, 5, 6, 7]
    assert sorted(folder.name[-1] for folder in later.iterdir()) == ["4", "6"]
    assert step_folder(tmp_path, 2).is_dir()
    note = set_aside(tmp_path, 6)
    assert note.startswith("going on after step 6, 1 step is repeated; their rows")
    assert set_aside(tmp_path, 0).startswith("starting again: no checkpoint yet, 7 steps are")


@pytest.mark.parametrize(
    ("rows", "save_every", "finished"), [(5, 0, True), (4, 0, False), (5, 10, False), (0, 0, False)]
)
def test_finished_without_checkpoints(
    tmp_path: Path, rows: int, save_every: int, finished: bool
) -> None:
    write_config(run(tmp_path, save_every=save_every))
    assert not finished_without_checkpoints(tmp_path, 5)
    write_rows(tmp_path, rows)
    assert finished_without_checkpoints(tmp_path, 5) is finished


def test_what_ends_a_write_is_one_line(tmp_path: Path) -> None:
    expected = r"cannot be written \(Is a directory\); no checkpoint is there"
    with pytest.raises(RunFailure, match=expected), writing(tmp_path):
        tmp_path.write_text("")
    step_folder(tmp_path, 3).mkdir(parents=True)
    with pytest.raises(RunFailure, match="step_00000003; make it"), writing(tmp_path):
        tmp_path.write_text("")


def test_every_start_leaves_a_row(tmp_path: Path) -> None:
    for step in (0, 5):
        record_start(tmp_path, step=step, num_processes=4)
    rows = [json.loads(line) for line in (tmp_path / STARTS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5]
    assert rows[0]["num_processes"] == 4
    assert rows[1].keys() == {"step", "num_processes", *describe_environment()}
    assert rows[1]["python"] == ".".join(map(str, sys.version_info[:3]))


def lock_of(holder: lock.Holder, folder: Path, age: float = 0.0) -> Path:
    path = folder / LOCK
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_lock_is_held_and_released(tmp_path: Path) -> None:
    lock.check_free(tmp_path)
    with lock.held(tmp_path / "run") as note:
        assert note == ""
        for ask in (lock.check_free, lambda folder: lock.held(folder).__enter__()):
            with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since"):
                ask(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    lock.check_free(tmp_path / "run")


def test_a_lock_is_released_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RunFailure), lock.held(tmp_path):
        raise RunFailure("diverged")
    assert not (tmp_path / LOCK).exists()


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = lock._this_process()
    holder = dataclasses.replace(mine, pid=child.pid, began=processes.began(child.pid))
    lock_of(holder, tmp_path)
    with pytest.raises(UserError, match=f"in use by process {child.pid}"):
        lock.check_free(tmp_path)
    child.kill()
    while processes.began(child.pid):  # it stays a zombie until it is waited for
        time.sleep(0.01)
    lock.check_free(tmp_path)
    child.communicate()
    with lock.held(tmp_path) as note:
        assert note == f"note: replaced the lock of {holder}, which is gone"
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_process_id_that_is_used_again(tmp_path: Path) -> None:
    lock_of(dataclasses.replace(lock._this_process(), began="1"), tmp_path)
    lock.check_free(tmp_path)


def other_machine() -> lock.Holder:
    return dataclasses.replace(lock._this_process(), host="node7", machine="another boot", pid=1)


def test_a_process_of_another_machine_that_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lock_of(other_machine(), tmp_path, age=100)
    lock.check_free(tmp_path)  # only rank 0 waits
    touch = threading.Timer(0.5, os.utime, [path])
    touch.start()
    with pytest.raises(UserError, match=r"in use by process 1 on node7 since"):
        lock.held(tmp_path).__enter__()
    touch.join()
    assert re.fullmatch(
        r"waiting up to (79|80) s for a sign of life of process 1 on node7 .*\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("named", [True, False])
def test_a_process_of_another_machine_that_is_gone(tmp_path: Path, named: bool) -> None:
    path = lock_of(other_machine(), tmp_path)
    if not named:
        path.write_text('{"host"')  # killed while it wrote
    os.utime(path, (0, 0))
    with lock.held(tmp_path) as note:
        who = "process 1 on node7 since" if named else "a start that left no name"
        assert who in note
        assert note.endswith("which is gone")
    assert not list(tmp_path.iterdir())


def test_a_process_of_another_machine_that_ends(tmp_path: Path) -> None:
    path = lock_of(other_machine(), tmp_path)
    end = threading.Timer(0.5, path.unlink)
    end.start()
    with lock.held(tmp_path):
        end.join()
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_ranks_of_one_launch_do_not_refuse_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with lock.held(tmp_path):
        lock.check_free(tmp_path)
        monkeypatch.setenv("MASTER_PORT", "29501")
        with pytest.raises(UserError, match="in use by"):
            lock.check_free(tmp_path)


def test_a_lock_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with lock.held(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 300
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0
