"""How many threads decode, and the warning that they are too few."""

from __future__ import annotations

import pytest

from deepmim_scale.config import RunConfig
from deepmim_scale.data import threads
from deepmim_scale.data.threads import WINDOW, WaitWatch, num_decoding_threads


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(64, 8, 8), (10, 4, 2), (2, 4, 1), (3, 1, 3)]
)
def test_cores_are_shared_by_the_processes_of_a_host(
    cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert num_decoding_threads(RunConfig()) == expected
    assert num_decoding_threads(RunConfig(loader_threads=5)) == 5


def told(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Steps of one second each and what they wait -> steps with a warning."""
    now = 100.0
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now)
    watch, found = WaitWatch(3), []
    for step, seconds in enumerate(waits):
        now += 1.0
        if line := watch.after_step(seconds):
            found.append((step, line))
    return found


def test_a_warning_once_where_waiting_exceeds_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first step's wait does not count, nor does a share of just 5 %.
    assert told([30.0] + [0.04] * 100, monkeypatch) == []
    ((step, line),) = told([0.0] + [0.0] * WINDOW + [0.1] * 100, monkeypatch)
    assert step == 2 * WINDOW
    assert line.startswith("warning: loader_threads=3: steps wait for images for 10% of their")
