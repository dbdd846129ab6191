"""Stopping well: signals, time limits and a launcher that is gone become one wish to stop.

Signals belong to the process, and so does the wish. A thread hears them: Python's own handlers
wait until a library's call returns, which may take minutes. Before the first step the process ends
at once. From then on all ranks agree at the end of a step. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deepmim_scale.operation import seconds_of
from deepmim_scale.runs.processes import Process, find_launchers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Slurm, torchrun and deepspeed each pass a signal on: what comes so soon is the same one.
SAME_SIGNAL_SECONDS = 3.0
SLURM_MARGIN_SECONDS = 120.0
WATCH_SECONDS = 1.0


@dataclass
class _Wish:
    reason: str = ""
    """Why this process wishes to stop; empty as long as it does not."""
    heard: float = 0.0
    """When a signal came first, s of the monotonic clock; 0 before."""
    limit: float = float("inf")
    """When time is up, s of the monotonic clock."""
    limit_reason: str = ""
    takes_steps: bool = False
    """What has been done can be saved."""
    has_step: bool = False
    """A step was taken since the start."""
    is_over: bool = False
    """All is saved: signals change nothing any more."""
    releases: list[Callable[[], None]] = field(default_factory=list)
    command: str = ""
    """What a user typed to start this run."""


_wish = _Wish()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Hear signals and watch the launcher while a run is started, trains and ends."""
    global _wish
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    launchers = find_launchers()
    _wish = _Wish(command=_command(launchers))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # nohup asks for SIGHUP to be ignored.
    heard = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    for number in heard:
        signal.siginterrupt(number, False)  # calls of libraries go on
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader, launchers), name="stop", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            # A launcher ends ranks that are only tidying up; their exit code stands already.
            signal.signal(number, signal.SIG_IGN if _wish.is_over else handler)
        os.close(writer)


def ignore_signals(*_: object) -> None:
    """Leave signals to the rank: a process that loads images for it ends with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _command(launchers: list[Process]) -> str:
    typed = [process for process in launchers if not process.words[0].startswith("slurmstepd")]
    own = Process(os.getpid(), "", (sys.orig_argv[0], *sys.orig_argv[1:]))
    return str(typed[-1] if typed else own)


def limit_time(stop_after: str) -> None:
    """Wish to stop after a duration from now, and two minutes before a Slurm job's end."""
    if stop_after:
        _set_limit(seconds_of(stop_after), f"--stop-after {stop_after}")
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        _set_limit(int(end) - time.time() - SLURM_MARGIN_SECONDS, "the end of the Slurm job")


def _set_limit(seconds: float, reason: str) -> None:
    limit = time.monotonic() + seconds
    if limit < _wish.limit:
        _wish.limit, _wish.limit_reason = limit, reason


def reason() -> str:
    """Why this process wishes to stop; empty if it does not."""
    if not _wish.reason and time.monotonic() >= _wish.limit:
        _wish.reason = _wish.limit_reason
    return _wish.reason


def command() -> str:
    """The command line that started this run, launcher included."""
    return _wish.command


def before_leaving(release: Callable[[], None]) -> None:
    """Have `release` called where a signal ends the process at once."""
    _wish.releases.append(release)


def begin_steps() -> None:
    """From now on a wish to stop waits for the end of a step; every rank is about to take one."""
    _wish.takes_steps = True


def step_taken() -> None:
    """There is something to save."""
    _wish.has_step = True


def may_leave_unsaved() -> bool:
    """Whether to stop is wished and loses nothing."""
    return bool(reason()) and not _wish.has_step


def all_saved() -> None:
    """Every rank is done: from now on signals change nothing."""
    _wish.is_over = True


def leave_unsaved(why: str) -> None:
    """End this process at once, before its first step."""
    if os.environ.get("RANK", "0") == "0":
        print_line(
            f"stopped by {why} before the first step of this start: nothing to save; "
            f"to go on: {command()}"
        )
    _leave(os.EX_TEMPFAIL)


def print_line(text: str) -> None:
    """One line on stdout, if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def _leave(code: int) -> None:
    for release in _wish.releases:
        with contextlib.suppress(OSError):
            release()
    # Not sys.exit: this is no thread's end but the process's.
    os._exit(code)


def _listen(reader: int, launchers: list[Process]) -> None:
    """Until the other end is closed; a second after a launcher has gone, that is a wish, too."""
    wish = _wish
    while True:
        readable, _, _ = select.select([reader], [], [], WATCH_SECONDS)
        numbers = os.read(reader, 64) if readable else b""
        if readable and not numbers:
            os.close(reader)
            return
        if wish.is_over:
            continue
        for number in numbers:
            _hear(wish, number)
        if not wish.reason and any(process.is_gone for process in launchers):
            _ask(wish, "the end of its launcher")


def _hear(wish: _Wish, number: int) -> None:
    if number not in SIGNALS:
        return
    name, now = signal.Signals(number).name, time.monotonic()
    if not wish.heard:
        wish.heard = now
        _ask(wish, name)
    elif now - wish.heard >= SAME_SIGNAL_SECONDS:
        if os.environ.get("RANK", "0") == "0":
            print_line(f"stopped at once by another {name}; to go on: {command()}")
        _leave(128 + number)


def _ask(wish: _Wish, why: str) -> None:
    wish.reason = wish.reason or why
    if not wish.takes_steps:
        leave_unsaved(why)
