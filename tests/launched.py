"""Small runs under real launchers, to be stopped, killed and started again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from free_port import free_port
from PIL import Image

from deepmim_scale.checkpoint import files
from deepmim_scale.runs.folder import METRICS, list_checkpoints, step_of

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0
"""Seconds after which a test gives up: how fast the machine is decides nothing."""
# Two blocks, two losses, 4 images per step in 2 micro-batches of one replica.
SMALL = [
    *("--preset", "debug", "--depth", "2", "--taps", "1", "2", "--decoder-depth", "1"),
    *("--microbatch-size", "2", "--global-batch", "4", "--warmup-epochs", "0", "--blr", "0.1"),
    *("--validate-every", "0", "--print-every", "1", "--seed", "3"),
]


def write_noise(root: Path) -> str:
    """32 images of noise in two classes, a few of them for validation; gives the folder back."""
    pixels = np.random.default_rng(0)
    for number in range(32):
        path = root / ("train", "val")[number % 8 == 0] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    return str(root)


def launcher_words(launcher: str, processes: int) -> list[str]:
    """How a user starts so many processes under a launcher."""
    count, port = str(processes), str(free_port())
    return {
        "deepspeed": ["deepspeed", "--num_accelerators", count, "--master_port", port],
        "torchrun": ["torchrun", "--nproc_per_node", count, "--master_port", port],
        "python": [sys.executable],
    }[launcher]


def members(group: int) -> list[int]:
    """Processes of a process group that have not ended, launchers and loaders included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


class Launch:
    """One start of a script of `launcher/`, in a process group of its own."""

    def __init__(
        self, launcher: str, run: Path, *words: str, processes: int = 2, script: str = "pretrain"
    ) -> None:
        self.run, self.log = run, Path(tempfile.mkdtemp()) / "log"
        command = [*launcher_words(launcher, processes), str(ROOT / "launcher" / f"{script}.py")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *words, "--output", str(run)],
                cwd=ROOT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All that was printed so far."""
        return self.log.read_text()

    @property
    def rows(self) -> int:
        """Steps that have left a row."""
        metrics = self.run / METRICS
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds or the launch has ended."""
        deadline = time.monotonic() + PATIENCE
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """A signal to the launcher alone, as `kill` would."""
        self.process.send_signal(number)

    def end(self, patience: float = PATIENCE) -> int:
        """The launcher's exit code, once every process of the launch has ended."""
        code = self.process.wait(patience)
        deadline = time.monotonic() + patience
        while members(self.process.pid):
            assert time.monotonic() < deadline, f"left behind:\n{self.said}"
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """End whatever is left."""
        for pid in members(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def last_saved(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = list_checkpoints(run)
    return (step_of(found[-1]) or 0) if found else 0


def digest(run: Path) -> str:
    """Of what is trained in the newest checkpoint, with its moments, for any number of stages.

    A frozen position table is stored once per stage, and thus under other names.
    """
    folder, whole = files.resolve(run), hashlib.sha256()
    moments = files.read_tensors(folder, "optimizer")
    trained = {name.partition("/")[2] for name in moments}
    for tensors in (files.read_tensors(folder, "weights", trained), moments):
        for name, tensor in sorted(tensors.items()):
            whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()
