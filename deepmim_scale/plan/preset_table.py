"""The command `deepmim-scale presets`: what can be trained without setting anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.config import RunConfig
from deepmim_scale.methods import method_of
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.presets import PRESETS, load_preset
from deepmim_scale.settings import FrozenConfig

_OURS = "deepmim_scale"
# What all these recipes share; a preset that differs is a small one of ours.
_RECIPE = ("global_batch", "blr", "weight_decay", "warmup_epochs")

Row = dict[str, Any]


class PresetsArguments(FrozenConfig):
    """List the presets with their sizes and costs."""

    json_path: Annotated[str, tyro.conf.arg(name="json", metavar="FILE")] = ""
    """File for the same list as JSON."""


def build_rows() -> list[Row]:
    """One row of plain values for each preset, in their order."""
    return [_row(name, load_preset(name)) for name in PRESETS]


def _row(name: str, config: RunConfig) -> Row:
    model, cost = config.model, model_cost(config.model)
    published = all(getattr(config, key) == getattr(RunConfig(), key) for key in _RECIPE)
    return {
        "preset": name,
        "method": model.method,
        "target": model.target,
        "encoder": {"depth": model.depth, "width": model.embed_dim, "heads": model.num_heads},
        "image": {"size": model.img_size, "patch": model.patch_size},
        "decoders": {
            "taps": list(model.taps),
            "depth": model.decoder_depth,
            "width": model.decoder_embed_dim,
        },
        "parameters": cost.whole.parameters,
        "training_gflops_per_image": round(cost.executed.training_flops / 1e9, 3),
        "recipe": method_of(model).source if published else _OURS,
    }


_HEAD = ("preset", "method", "target", "encoder", "decoders", "params/M", "GFLOPs/image", "recipe")


def _cells(row: Row) -> tuple[str, ...]:
    encoder, decoders = row["encoder"], row["decoders"]
    return (
        row["preset"],
        row["method"],
        row["target"],
        f"{encoder['depth']} x {encoder['width']}",
        f"{len(decoders['taps'])} of {decoders['depth']} x {decoders['width']}",
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['training_gflops_per_image']:.2f}",
        row["recipe"],
    )


def run_presets(args: PresetsArguments) -> None:
    """Print the table, and write it where asked for."""
    path = writable("json", args.json_path) if args.json_path else None
    rows = build_rows()
    table = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())
    print("encoder and decoders: blocks x width; GFLOPs: forward, backward and teacher (counted)")
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")
