"""Processes of this machine: when they began, which of them launched this one. No torch here."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

# Words of a launcher's own command line; a shell that was given one as text has none of them.
_LAUNCHERS = frozenset(
    {
        "deepspeed",
        "deepspeed.launcher.launch",
        "deepspeed.launcher.runner",
        "torchrun",
        "torch.distributed.run",
        "torch.distributed.launch",
        "srun",
        "mpirun",
    }
)


@dataclass(frozen=True)
class Process:
    """One process; its id alone may be used again."""

    pid: int
    began: str
    words: tuple[str, ...]
    """Its command line."""

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return began(self.pid) != self.began

    @property
    def launches(self) -> bool:
        """Whether it starts the ranks of a run, or another launcher."""
        words = [Path(self.words[0]).name, *self.words[1:]]
        if words[0].startswith("python"):  # the script or module that it runs
            words = [word for word in words[1:] if word not in ("-u", "-m")] or [""]
        return Path(words[0]).name in _LAUNCHERS or words[0].startswith("slurmstepd")

    def __str__(self) -> str:
        return shlex.join(self.words)


def _stat(pid: int) -> list[str]:
    """What /proc tells after the name of a program, which may hold blanks; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def began(pid: int) -> str:
    """When a process of this machine began, in clock ticks after boot; empty if it is gone."""
    fields = _stat(pid)
    return "" if not fields or fields[0] == "Z" else fields[19]


def _find(pid: int) -> Process | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    if not words:  # a kernel's thread, or a process that ends
        return None
    return Process(pid, began(pid), tuple(words.rstrip("\0").split("\0")))


def find_launchers() -> list[Process]:
    """The launchers above this process, the nearest first; empty for plain Python."""
    found: list[Process] = []
    parent = _find(os.getppid())
    while parent is not None and parent.launches:
        found.append(parent)
        fields = _stat(parent.pid)
        parent = _find(int(fields[1])) if fields else None
    return found
