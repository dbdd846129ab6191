"""What a person sees: a bar on a terminal, plain lines elsewhere; silent on all ranks but one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

# (row of metrics, steps of the run) -> one line
StepLine = Callable[[dict[str, Any], int], str]


class Progress:
    """Prints for the rank that speaks."""

    def __init__(self, *, is_main: bool, line: StepLine | None = None) -> None:
        self._is_main, self._line = is_main, line or step_line
        self._bar: tqdm | None = None

    def print_main(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def start(self, total: int, first: int) -> None:
        """Begin a run of `total` steps of which `first` are done."""
        if self._is_main and sys.stdout.isatty():
            self._bar = tqdm(total=total, initial=first, unit="step", file=sys.stdout)

    def step(self, row: dict[str, Any] | None, total: int, every: int) -> None:
        """Report one step: bar, and a line every `every` steps, at the end and if skipped.

        Without a row (none was due) the bar moves on.
        """
        if self._bar is not None:
            self._bar.update()
        if row is None:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.4f}")
        if row["step"] % every == 0 or row["step"] == total or row["skipped"]:
            self.print_main(self._line(row, total))

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def step_line(row: dict[str, Any], total: int) -> str:
    """One step as one line."""
    losses = " ".join(f"{name} {value:.4f}" for name, value in row["losses"].items())
    utilization = f" | MFU {row['mfu']:.1%}" if "mfu" in row else ""
    idle = sum(row["idle_fraction"]) / len(row["idle_fraction"])
    waiting = f" | idle {idle:.0%}" if idle >= 0.01 else ""  # of a pipeline's ranks, measured
    validation = f" | validation {row['validation_loss']:.4f}" if "validation_loss" in row else ""
    skipped = " | skipped: gradients not finite" if row["skipped"] else ""
    return (
        f"step {row['step']}/{total}{skipped} | loss {row['loss']:.4f} ({losses}) | "
        f"grad {row['grad_norm']:.3f} | lr {row['learning_rate']:.2e} | "
        f"{row['images_per_second']:.0f} images/s{utilization}{waiting} | "
        f"{max(row['peak_memory_gib']):.2f} GiB | wait {row['loader_wait_ms']:.0f} ms{validation}"
    )
