"""What a run was started with: machine, versions, commit. A row of starts.jsonl for each start."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deepmim_scale.runs.folder import STARTS


def describe_environment() -> dict[str, str]:
    """What figures need to be repeated: device, versions, commit, host, date."""
    import torch

    found = {"device": _cpu_name()}
    if torch.cuda.is_available():
        found = {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return {
        **found,
        "python": platform.python_version(),
        **{package: _version_of(package) for package in ("torch", "deepspeed", "triton")},
        "commit": _commit(),
        "host": socket.gethostname(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def record_start(run: str | Path, *, step: int, num_processes: int, **layout: int) -> None:
    """Append what this start, after `step` steps, runs on, and how it shares a step."""
    row = {"step": step, "num_processes": num_processes, **layout, **describe_environment()}
    with (Path(run) / STARTS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this code, with -dirty if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        git = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:  # git is not installed
        return "unknown"
    return git.stdout.strip() or "unknown"


def _driver() -> str:
    info = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", info.read_text()) if info.is_file() else None
    return found[0] if found else "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return f"{os.cpu_count()} cores, {found[1] if found else platform.machine()}"
