"""What a fine-tuned run leaves: weights that timm and the official code load, and its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deepmim_scale.checkpoint import files
from deepmim_scale.checkpoint.export import LICENCE
from deepmim_scale.checkpoint.sizes import header_of

if TYPE_CHECKING:
    from deepmim_scale.finetune.prepare import PreparedFinetune

RESULT = "result.json"
Row = dict[str, Any]


def published(row: Row) -> float:
    """The accuracy of a row that counts, in percent: the average's where there is one."""
    found: float = row["ema_accuracy" if "ema_accuracy" in row else "accuracy"]
    return found


def summarize(rows: Sequence[Row]) -> dict[str, Row]:
    """Best and last evaluation of a run's rows; of equal ones the first is the best."""
    evaluated = [row for row in rows if "accuracy" in row]
    best = max(evaluated, key=published)
    return {
        name: {"step": row["step"], "epoch": row["epoch"], "accuracy": published(row)}
        for name, row in (("best", best), ("last", evaluated[-1]))
    }


def write_weights(
    prepared: PreparedFinetune,
    weights: Mapping[str, Tensor],
    summary: Mapping[str, Row],
    names: Sequence[str],
) -> None:
    """Write weights under timm's names as each of the files `names`, and the result so far."""
    output = Path(prepared.config.output)
    header = header_of(prepared.sizes, prepared.sources.names) | {
        "format": "pt",
        "names": "timm",
        "preset": prepared.config.preset,
        "step": str(summary["last"]["step"]),
        "accuracy": f"{summary['last']['accuracy']:.4f}",
        "licence": LICENCE,
    }
    tensors = {name: value.detach().float().cpu() for name, value in weights.items()}
    for name in names:
        part = output / f"{name}.part"
        files.write_tensors(part, tensors, header)
        part.rename(output / name)
    content = {**summary, "classes": list(prepared.sources.names)}
    (output / RESULT).write_text(json.dumps(content, indent=1) + "\n")


def result_line(summary: Mapping[str, Row]) -> str:
    """Best and last accuracy in words."""
    best, last = summary["best"], summary["last"]
    return (
        f"best {best['accuracy']:.2f} % after step {best['step']}, last {last['accuracy']:.2f} % "
        f"after step {last['step']}"
    )


def step_line(row: Row, total: int) -> str:
    """One step as one line."""
    accuracy = f" | accuracy {row['accuracy']:.2f} %" if "accuracy" in row else ""
    average = f" (average {row['ema_accuracy']:.2f} %)" if "ema_accuracy" in row else ""
    skipped = " | skipped: gradients not finite" if row["skipped"] else ""
    utilization = f" | MFU {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"step {row['step']}/{total}{skipped} | loss {row['loss']:.4f} | "
        f"grad {row['grad_norm']:.3f} | lr {row['learning_rate']:.2e} | "
        f"{row['images_per_second']:.0f} images/s{utilization} | "
        f"{row['peak_memory_gib']:.2f} GiB | wait {row['loader_wait_ms']:.0f} ms{accuracy}{average}"
    )
