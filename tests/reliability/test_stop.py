"""Signals and limits at any moment: saved, told, ended with the documented code, and gone on from.

Real processes under real launchers; a clean run in one process is the judge.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from launched import SMALL, Launch, digest, last_saved, members, write_noise

from deepmim_scale.errors import STOPPED
from deepmim_scale.operation import Operation, seconds_of
from deepmim_scale.runs import stop
from deepmim_scale.runs.folder import read_metrics

STEPS = 40
WORDS = [*SMALL, "--steps", str(STEPS), "--save-every", "1000"]
# What a launcher itself reports when it gets the signal, and when a worker stopped by itself.
LAUNCHER_CODES = {
    ("deepspeed", signal.SIGTERM): -signal.SIGTERM,  # its runner dies without a word to its workers
    ("torchrun", signal.SIGTERM): 1,
    ("python", signal.SIGTERM): STOPPED,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_noise(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def clean(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the weights are after a run that nobody disturbed."""
    run = tmp_path_factory.mktemp("clean") / "run"
    launch = Launch("python", run, *WORDS, "--data", data)
    assert launch.end() == 0, launch.said
    return digest(run)


def check_stopped(launch: Launch, rows_before: int) -> None:
    """What was done is saved, said, and nothing is left behind."""
    saved = last_saved(launch.run)
    assert saved >= rows_before
    assert saved == launch.rows, "a checkpoint after the last step that left a row"
    (line,) = [line for line in launch.said.splitlines() if line.startswith("stopped by")]
    assert f"after step {saved}, saved in " in line, line
    assert "; to go on: " in line
    assert not (launch.run / "lock.json").exists()
    assert "Traceback" not in re.sub(r"(?s)Traceback.*torch/distributed/run.*", "", launch.said)


# As many stages as processes: replicas would sum in another order than one process.
@pytest.mark.parametrize(("launcher", "stages"), [("deepspeed", 2), ("torchrun", 2), ("python", 1)])
def test_a_launcher_is_terminated(
    data: str, clean: str, tmp_path: Path, launcher: str, stages: int
) -> None:
    run, words = tmp_path / "run", [*WORDS, "--data", data]
    first = Launch(launcher, run, *words, "--stages", str(stages), processes=stages)
    try:
        first.wait_for(lambda: first.rows >= 3)
        rows = first.rows
        first.send(signal.SIGTERM)
        assert first.end() == LAUNCHER_CODES[launcher, signal.SIGTERM], first.said
    finally:
        first.kill()
    check_stopped(first, rows)
    saved = last_saved(run)
    again = Launch("python", run, *words, "--save-every", "0", "--save-minutes", "0.0001")
    assert again.end() == 0, again.said
    assert f"resuming after step {saved} from" in again.said
    stalls = [row["save_stall_ms"] for row in read_metrics(run) if "save_stall_ms" in row]
    assert all(stall > 0 for stall in stalls)
    assert stalls, "a checkpoint is due by time in every step"
    assert digest(run) == clean


def test_one_rank_is_told(data: str, tmp_path: Path) -> None:
    """All ranks agree; the launcher then reports the code of its workers."""
    launch = Launch("deepspeed", tmp_path / "run", *WORDS, "--data", data, "--stages", "2")
    try:
        launch.wait_for(lambda: launch.rows >= 2)
        rows, worker = launch.rows, max(members(launch.process.pid))
        os.kill(worker, signal.SIGUSR1)
        assert launch.end() == STOPPED, launch.said
    finally:
        launch.kill()
    check_stopped(launch, rows)


def test_before_the_first_step(data: str, tmp_path: Path) -> None:
    launch = Launch("python", tmp_path / "run", *WORDS, "--data", data)
    try:
        launch.wait_for(lambda: (tmp_path / "run" / "lock.json").exists())
        launch.send(signal.SIGINT)
        assert launch.end() == STOPPED
    finally:
        launch.kill()
    assert "stopped by SIGINT before the first step of this start: nothing to save" in launch.said
    assert last_saved(launch.run) == 0
    assert not (launch.run / "lock.json").exists()


def test_a_limit_of_time(data: str, tmp_path: Path) -> None:
    words = [*WORDS, "--steps", "100000", "--data", data, "--stop-after", "1s"]
    launch = Launch("python", tmp_path / "run", *words)
    assert launch.end() == STOPPED, launch.said
    check_stopped(launch, 1)
    assert "stopped by --stop-after 1s" in launch.said


def test_durations() -> None:
    assert [seconds_of(text) for text in ("23h30m", "45m", "90s", "90", "1h1s")] == [
        84600,
        2700,
        90,
        90,
        3601,
    ]
    for text in ("0", "1d", "h", "1m2h", "-5m"):
        with pytest.raises(ValueError, match=f"stop_after={text}: must be a duration"):
            Operation(stop_after=text)


def test_the_end_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_wish", stop._Wish())
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    stop.limit_time("2h")
    assert not stop.reason()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    stop.limit_time("2h")
    assert stop.reason() == "the end of the Slurm job"


def test_fine_tuning_is_stopped(data: str, tmp_path: Path) -> None:
    """Its loaders are processes of their own, to which launchers pass every signal on."""
    sizes = ["--img-size", "32", "--patch-size", "8", "--embed-dim", "32", "--num-heads", "4"]
    words = [*sizes, "--depth", "2", "--data", data, "--microbatch-size", "2", "--validate-every"]
    words += ["1000", "--global-batch", "4", "--print-every", "1", "--loader-workers", "1"]
    run = tmp_path / "run"
    launch = Launch("torchrun", run, *words, "--steps", "100000", script="finetune")
    try:
        launch.wait_for(lambda: launch.rows >= 3)
        rows = launch.rows
        launch.send(signal.SIGTERM)
        assert launch.end() == 1, launch.said
    finally:
        launch.kill()
    check_stopped(launch, rows)
    more = str(last_saved(run) + 2)
    again = Launch(
        "python", run, *words, "--steps", "100000", "--stop-after", "1", script="finetune"
    )
    assert again.end() == STOPPED
    assert f"resuming after step {int(more) - 2} from" in again.said


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "python"])
def test_signals_at_random_moments(data: str, clean: str, tmp_path: Path, launcher: str) -> None:
    """SIGNALS times (default 67 for each of three launchers) over starts, steps and saves."""
    random.seed(launcher)
    for number in range(int(os.environ.get("SIGNALS", "67"))):
        run = tmp_path / f"run{number}"
        stages = 1 if launcher == "python" else random.choice([1, 2])
        words = [*WORDS, "--data", data, "--stages", str(stages)]
        words += ["--save-every", random.choice(["1", "7", "1000"])]
        disturb(launcher, run, words, stages)
        again = Launch("python", run, *WORDS, "--data", data)
        assert again.end() == 0, again.said
        assert digest(run) == clean, f"{launcher}, run {number}"


def disturb(launcher: str, run: Path, words: list[str], processes: int) -> None:
    """Send one signal at a random moment after the handlers are there."""
    sent = random.choice([signal.SIGTERM, signal.SIGINT])
    launch = Launch(launcher, run, *words, processes=processes)
    try:
        launch.wait_for((run / "lock.json").exists)
        time.sleep(random.uniform(0, 12))
        rows, before = launch.rows, last_saved(run)
        launch.send(sent)
        code = launch.end(60)
        if f"done: {STEPS} steps" not in launch.said:
            # torchrun reports 1, deepspeed's runner how it was killed.
            assert code in (STOPPED, 1, 130, -sent), launch.said
            assert last_saved(run) >= max(rows, before), launch.said
            assert "stopped by" in launch.said, launch.said
    finally:
        launch.kill()
