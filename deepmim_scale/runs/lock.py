"""One start at a time in a run's folder: lock.json names the process that works there.

A process of this machine is looked up. One of another machine lives while it touches the file.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from deepmim_scale.arguments import writable
from deepmim_scale.errors import UserError
from deepmim_scale.runs.folder import LOCK, writing
from deepmim_scale.runs.processes import began
from deepmim_scale.runs.stop import before_leaving

BEAT_SECONDS = 30.0
# Six beats, since a network's file system may show a touch a minute later.
STALE_SECONDS = 180.0


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder."""

    host: str
    pid: int
    began: str
    """When the process began, clock ticks after boot: a process id alone is used again."""
    machine: str
    """Boot and process namespace, within which process ids mean something."""
    launch: str
    """Where the ranks of its launch meet; empty for a single process."""
    since: str
    """Date and time of the start."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _machine() -> str:
    # Containers may share a host's name, but not its process ids.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _launch() -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def _this_process() -> Holder:
    pid = os.getpid()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(socket.gethostname(), pid, began(pid), _machine(), _launch(), now)


def _read(lock: Path) -> tuple[str, Holder | None] | None:
    """Text of a lock and its holder (None while it is being written); None if there is none."""
    try:
        text = lock.read_text()
    except FileNotFoundError:
        return None
    try:
        return text, Holder(**json.loads(text))
    except (ValueError, TypeError):
        return text, None


def _is_gone(holder: Holder | None) -> bool | None:
    """Whether a process of this machine is gone; None for one of another machine."""
    if holder is None or not holder.machine or holder.machine != _machine():
        return None
    return began(holder.pid) != holder.began


def _in_use(lock: Path, holder: Holder | None) -> UserError:
    who = holder or "a start that left no name"
    return UserError(f"output={lock.parent}: in use by {who}; wait for it or end it")


def check_free(run: str | Path) -> None:
    """UserError if another launch works in the folder on this machine; every rank asks."""
    lock = Path(run) / LOCK
    _, holder = _read(lock) or ("", None)
    # Rank 0 of this very launch may have been here first.
    is_ours = holder is not None and holder.launch and holder.launch == _launch()
    if _is_gone(holder) is False and not is_ours:
        raise _in_use(lock, holder)


@contextlib.contextmanager
def held(run: str | Path) -> Iterator[str]:
    """Hold a run's folder; gives a note if the lock of a dead process was replaced.

    One process of a launch calls it. UserError names host, process and time of the holder.
    """
    lock = writable("output", Path(run) / LOCK)
    with writing(run):
        text, note = _take(lock)
    stop = threading.Event()
    threading.Thread(target=_beat, args=(lock, stop), daemon=True).start()

    def release() -> None:
        stop.set()
        with contextlib.suppress(OSError):
            found = _read(lock)
            if found is not None and found[0] == text:
                lock.unlink()

    before_leaving(release)
    try:
        yield note
    finally:
        release()


def _take(lock: Path) -> tuple[str, str]:
    """Create the lock; returns its text and a note on the one that it replaces."""
    text, note = json.dumps(asdict(_this_process())) + "\n", ""
    while True:
        with contextlib.suppress(FileExistsError):
            _create(lock, text)
            return text, note
        found = _read(lock)
        if found is None:
            continue
        holder, gone = found[1], _is_gone(found[1])
        if gone is None:
            gone = _gives_no_sign(lock, holder)
        if not gone:
            raise _in_use(lock, holder)
        note = f"note: replaced the lock of {holder or 'a start that left no name'}, which is gone"
        _remove(lock, found[0])


def _create(lock: Path, text: str) -> None:
    with lock.open("x") as file:  # FileExistsError if there is one: the first start wins
        try:
            file.write(text)
            file.flush()
        except OSError:
            lock.unlink()
            raise


def _gives_no_sign(lock: Path, holder: Holder | None) -> bool:
    """Wait until a lock of another machine is touched, or was not for STALE_SECONDS.

    A job that was moved to another node goes on in this way, without a word from the old node.
    """
    try:
        touched = lock.stat().st_mtime
        # The file system's own clock, which may be that of a server.
        with tempfile.TemporaryFile(dir=lock.parent) as file:
            age = max(os.fstat(file.fileno()).st_mtime - touched, 0.0)
        left = STALE_SECONDS - age
        if left > 0:
            who = holder or "a start that left no name"
            print(f"waiting up to {left:.0f} s for a sign of life of {who} ({lock})", flush=True)
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_SECONDS))
            if lock.stat().st_mtime != touched:
                return False
    except FileNotFoundError:  # it has ended
        return True
    return True


def _remove(lock: Path, text: str) -> None:
    """Remove a stale lock, unless another start has replaced it since it was read."""
    aside = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(aside)  # of two starts only one succeeds
        if aside.read_text() != text:
            aside.rename(lock)
        else:
            aside.unlink()


def _beat(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(lock)
