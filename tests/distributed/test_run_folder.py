"""A run's folder under real starts: two at once, killed ones, a full disk, a vanished folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from free_port import free_port

from deepmim_scale.checkpoint import files
from deepmim_scale.runs.folder import LOCK, METRICS, list_checkpoints, read_metrics, step_folder

ROOT = Path(__file__).resolve().parents[2]
# Two blocks and 2 images per step; a checkpoint takes 1.6 MB.
SMALL = [
    *("--preset", "debug_mae", "--depth", "2", "--decoder-depth", "1"),
    *("--microbatch-size", "2", "--microbatches", "1", "--warmup-epochs", "0"),
    *("--validate-every", "0", "--print-every", "1"),
]
ENDLESS = ["--steps", "1000000", "--save-every", "0"]


class Started:
    """The processes of one launch; what they say goes to a file."""

    def __init__(self, photos: str, run: Path, *words: str, world: int = 1) -> None:
        # Not beside the run, whose disk may be full.
        self.log = Path(tempfile.mkdtemp()) / "log"
        command = [sys.executable, str(ROOT / "launcher" / "pretrain.py"), *SMALL]
        launch = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world),
        }
        self.processes = []
        for rank in range(world):
            ids = {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
            with self.log.open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--data", photos, "--output", str(run), *words],
                        env=os.environ | launch | ids,
                        cwd=ROOT,
                        stdout=log,
                        stderr=log,
                        # A suite in the background of a shell ignores SIGINT, and so would these.
                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                    )
                )

    @property
    def said(self) -> list[str]:
        """What all ranks have said so far."""
        return self.log.read_text().splitlines()

    @property
    def errors(self) -> list[str]:
        """The lines of it that name an error; there must be no traceback."""
        assert "Traceback" not in self.log.read_text(), self.log.read_text()
        return [line for line in self.said if line.startswith("error: ")]

    def end(self) -> list[int]:
        """Exit codes, once all have ended."""
        return [process.wait(300) for process in self.processes]

    def kill(self, how: signal.Signals = signal.SIGKILL) -> list[int]:
        """End all processes; a signal that a callback swallowed is sent again."""
        for process in self.processes:
            for _ in range(30):
                process.send_signal(how)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
        return self.end()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds."""
        deadline = time.monotonic() + 300
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)


def has_rows(run: Path) -> bool:
    """Whether a few steps have been taken."""
    metrics = run / METRICS
    return metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3


def fill(place: Path) -> None:
    """Leave no room in a file system."""
    with (place / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: room for one checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount program")
    if done.returncode:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_one_launch_at_a_time(photos: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Started(photos, run, *ENDLESS, world=2)
    try:
        first.wait_for(lambda: has_rows(run))
        second = Started(photos, run, *ENDLESS, world=2)
        assert second.end() == [2, 2]
        (line,) = second.said
        pid = first.processes[0].pid
        assert re.fullmatch(
            rf"error: output={run}: in use by process {pid} on {socket.gethostname()} since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait for it or end it",
            line,
        ), line
    finally:
        first.kill()
    rows = read_metrics(run)
    third = Started(photos, run, *ENDLESS, world=2)
    try:
        third.wait_for(lambda: any(line.startswith("step 1/") for line in third.said))
    finally:
        third.kill(signal.SIGINT)
    replaced = [line for line in third.said if line.startswith("note: replaced the lock")]
    assert len(replaced) == 1
    assert f"process {pid} on" in replaced[0]
    assert not (run / LOCK).exists(), "released at the end"
    # Nothing was saved: the steps are repeated, and their rows are not lost.
    (aside,) = run.glob("metrics.before-*.jsonl")
    assert f"{len(rows)} steps are repeated; their rows are in {aside}" in "\n".join(third.said)
    assert [json.loads(line) for line in aside.read_text().splitlines()] == rows
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["num_processes"] for start in starts] == [2, 2], "the refused one left no row"
    assert starts[0].keys() >= {"torch", "deepspeed", "triton", "python", "host", "commit", "date"}


def test_a_run_without_checkpoints_is_finished_once(photos: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--steps", "2", "--save-every", "0"]
    assert Started(photos, run, *words).end() == [0]
    rows = read_metrics(run)
    # Whether to save is free to change, and changes nothing here.
    again = Started(photos, run, "--steps", "2", "--save-every", "1")
    assert again.end() == [0], again.said
    assert f"finished already: 2 steps, results in {run}" in again.said
    assert read_metrics(run) == rows
    assert not list_checkpoints(run)


def test_going_back_to_an_older_checkpoint(photos: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--steps", "6", "--save-every", "1", "--keep-every", "2", "--blr", "1"]
    assert Started(photos, run, *words).end() == [0]
    assert list_checkpoints(run) == [step_folder(run, step) for step in (2, 4, 5, 6)]
    rows = read_metrics(run)
    back = Started(photos, run, *words, "--from", "step_00000002", "--keep-every", "0")
    assert back.end() == [0], back.said
    assert f"resuming after step 2 from {step_folder(run, 2)}" in back.said
    (aside,) = run.glob("metrics.before-*.jsonl")
    (later,) = run.glob("checkpoints.before-*")
    assert (
        f"going on after step 2, 4 steps are repeated; their rows are in {aside}; "
        f"3 later checkpoints are in {later}"
    ) in back.said
    assert sorted(int(folder.name[-1]) for folder in later.iterdir()) == [4, 5, 6]
    # The repeated steps give the same bits.
    before, after = (
        files.read_tensors(folder, "weights")
        for folder in (later / "step_00000006", files.resolve(run))
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["loss"] for row in read_metrics(run)] == [row["loss"] for row in rows]
    # A checkpoint chosen once is not chosen again by the saved configuration.
    assert "from_step" not in json.loads((run / "config.json").read_text())


def test_a_disk_that_is_full_while_saving(photos: str, small_disk: Path) -> None:
    run = small_disk / "run"
    words = ["--steps", "4", "--save-every", "2", "--keep-checkpoints", "1"]
    full = Started(photos, run, *words)
    assert full.end() == [1], full.said
    (line,) = full.errors
    assert re.fullmatch(
        rf"error: output={run}: cannot be written \(.*No space left.*\); last good checkpoint "
        rf"{step_folder(run, 2)}; make it writable and start again",
        line,
    ), line
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert files.integrity_error(step_folder(run, 2)) is None
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert Started(photos, run, *words).end() == [0]
    assert list_checkpoints(run) == [step_folder(run, 4)]


def test_a_disk_that_is_full_while_a_row_is_written(photos: str, small_disk: Path) -> None:
    run = small_disk / "run"
    started = Started(photos, run, *ENDLESS)
    try:
        started.wait_for(lambda: has_rows(run))
        with pytest.raises(OSError, match="No space left"):
            fill(small_disk)
        assert started.end() == [1]
    finally:
        started.kill()
    (line,) = started.errors
    assert f"output={run}: cannot be written (No space left on device); no checkpoint" in line
    assert [row["step"] for row in read_metrics(run)][:3] == [1, 2, 3]


def test_a_folder_that_vanishes(photos: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = Started(photos, run, *ENDLESS)
    try:
        started.wait_for(lambda: has_rows(run))
        shutil.move(run, tmp_path / "elsewhere")
        assert started.end() == [1]
    finally:
        started.kill()
    (line,) = started.errors
    assert f"output={run}: cannot be written (No such file or directory); no checkpoint" in line
    assert not run.exists(), "not made again"
