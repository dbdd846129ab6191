"""DeepSpeed's JSON: read, checked key by key, and its "auto" values filled in.

DeepSpeed accepts a misspelt top-level key silently and fails on a raw "auto"; so both are handled
here, before any process group starts. Only keys that act on this toolkit's engine are accepted.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deepmim_scale.config import MAX_MICROBATCHES
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json
from deepmim_scale.precision import Precision
from deepmim_scale.settings import pluralize

# Buckets beyond a stage's parameters only waste memory: DeepSpeed's default allocates 5e8 elements.
BUCKET_ELEMENTS = 25_000_000

_NUMBER = (int, float)
_POSITIVE = {"steps_per_print", "reduce_bucket_size", "allgather_bucket_size", "loss_scale_window"}
_DTYPES = ("fp16", "bf16", "fp32")
_LOSS_SCALE = {"initial_scale_power": int, "loss_scale_window": int, "min_loss_scale": _NUMBER}
_SCHEMA: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": _NUMBER,
    "communication_data_type": str,
    "steps_per_print": int,
    "memory_breakdown": bool,
    "dump_state": bool,
    "zero_optimization": {
        "stage": int,
        "reduce_bucket_size": _NUMBER,
        "allgather_bucket_size": _NUMBER,
        "overlap_comm": bool,
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "allgather_partitions": bool,
        "round_robin_gradients": bool,
        "use_multi_rank_bucket_allreduce": bool,
    },
    "torch_autocast": {"enabled": bool, "dtype": str},
    "bf16": {"enabled": bool},
    "fp16": {"enabled": bool, **_LOSS_SCALE},
    "loss_scale": _LOSS_SCALE,
    "comms_logger": {
        "enabled": bool,
        "verbose": bool,
        "prof_all": bool,
        "debug": bool,
        "prof_ops": list,
    },
}
_ELSEWHERE = {
    "optimizer": "set --optimizer, --blr, --weight-decay, --beta1, --beta2 and --eps instead",
    "scheduler": "the schedule is MAE's; set --blr and --warmup-epochs instead",
    "amp": "use torch_autocast",
    "pipeline": "stages are set on the command line",
    "wall_clock_breakdown": "DeepSpeed's timers need its own loop; use --profile",
    "prescale_gradients": "ZeRO-2 averages gradients as it reduces them; leave it out",
    "gradient_predivide_factor": "ZeRO-2 averages gradients as it reduces them; leave it out",
    "seq_parallel_communication_data_type": "sequences are not split; set communication_data_type",
}


class BatchSettings(Protocol):
    """The settings that DeepSpeed's JSON is filled in from, of any kind of run."""

    @property
    def microbatch_size(self) -> int:
        """Images per micro-batch and replica."""

    @property
    def microbatches(self) -> int | None:
        """Micro-batches per step."""

    @property
    def global_batch(self) -> int | None:
        """Images per step."""

    @property
    def clip_grad(self) -> float:
        """Largest norm of a gradient; 0 clips nothing."""


@dataclass(frozen=True)
class BatchSizes:
    """global_batch = microbatch_size * microbatches * num_replicas."""

    microbatch_size: int
    microbatches: int
    num_replicas: int

    @property
    def global_batch(self) -> int:
        """Images per optimizer step."""
        return self.microbatch_size * self.microbatches * self.num_replicas

    def __str__(self) -> str:
        microbatches = pluralize(self.microbatches, "micro-batch", "micro-batches")
        replicas = pluralize(self.num_replicas, "replica")
        return f"{self.global_batch} = {self.microbatch_size} x {microbatches} x {replicas}"


def resolve_batch(config: BatchSettings, num_replicas: int) -> BatchSizes:
    """Micro-batches per step from whichever of global_batch and microbatches is given."""
    size, given = config.microbatch_size, config.microbatches
    if config.global_batch is None:
        return BatchSizes(size, given or 1, num_replicas)
    share = size * num_replicas
    if config.global_batch % share:
        below = max(config.global_batch // share, 1) * share
        raise UserError(
            f"global_batch={config.global_batch}: must be divisible by microbatch_size x replicas "
            f"= {size} x {num_replicas}; e.g. --global-batch {below} or another --microbatch-size"
        )
    microbatches = config.global_batch // share
    if given not in (None, microbatches):
        raise UserError(
            f"microbatches={given}: global_batch={config.global_batch} needs {microbatches} "
            f"(microbatch_size {size}, {num_replicas} replicas); leave one of the two out"
        )
    if microbatches > MAX_MICROBATCHES:
        raise UserError(
            f"global_batch={config.global_batch}: needs {microbatches} micro-batches of "
            f"microbatch_size={size} on {pluralize(num_replicas, 'replica')}, at most "
            f"{MAX_MICROBATCHES} are built; raise --microbatch-size or lower --global-batch"
        )
    return BatchSizes(size, microbatches, num_replicas)


def load_ds_config(path: str) -> dict[str, Any]:
    """The checked JSON of a DeepSpeed configuration; values may still be "auto".

    A bare name, such as `a100_bf16.json`, that is no file here means the bundled one.
    """
    is_name = Path(path).name == path and not Path(path).exists()
    content = read_json((is_name and _find_bundled(path)) or path)
    _check(path, content, _SCHEMA, "")
    stage = content.get("zero_optimization", {}).get("stage")
    if stage != 2:
        raise UserError(f"{path}: zero_optimization.stage={stage}: must be 2 (ZeRO-2)")
    precision_of(content, path)
    return content


def _check(path: str, content: dict[str, Any], schema: dict[str, Any], prefix: str) -> None:
    for key, value in content.items():
        name = prefix + key
        if name in _ELSEWHERE:
            raise UserError(f"{path}: {name}: not taken from this file; {_ELSEWHERE[name]}")
        if key not in schema:
            near = difflib.get_close_matches(key, schema, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(schema)}"
            raise UserError(f"{path}: {name}: unknown key; {hint}")
        kind = schema[key]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name}={value!r}: must be an object")
            _check(path, value, kind, f"{name}.")
        elif value != "auto" and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            wanted = "a number" if kind is _NUMBER else f"of type {kind.__name__}"
            raise UserError(f'{path}: {name}={value!r}: must be {wanted} or "auto"')
        elif key in _POSITIVE and value != "auto" and value < 1:
            raise UserError(f"{path}: {name}={value}: must be at least 1")
        elif key == "communication_data_type" and value not in (*_DTYPES, "auto"):
            raise UserError(f"{path}: {name}={value!r}: must be one of {', '.join(_DTYPES)}")


def precision_of(content: dict[str, Any], path: str = "deepspeed_config") -> Precision:
    """The precision that `torch_autocast`, `bf16` or `fp16` asks for; fp32 without any."""
    enabled = [
        key
        for key in ("torch_autocast", "bf16", "fp16")
        if content.get(key, {}).get("enabled", False)
    ]
    if len(enabled) > 1:
        raise UserError(f"{path}: {' and '.join(enabled)} are enabled; keep one of them")
    if not enabled:
        return Precision.FP32
    if enabled != ["torch_autocast"]:
        return Precision.PURE_BFLOAT16 if enabled == ["bf16"] else Precision.PURE_FLOAT16
    dtype = content["torch_autocast"].get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "float16"):
        raise UserError(f"{path}: torch_autocast.dtype={dtype!r}: must be bfloat16 or float16")
    return Precision(dtype)


def resolve_ds_config(
    content: dict[str, Any], config: BatchSettings, batch: BatchSizes
) -> tuple[dict[str, Any], list[str]]:
    """Fill in every "auto" from the run; returns the JSON and what was filled in, as words.

    UserError where a given value disagrees with the command line.
    """
    derived = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.microbatch_size,
        "gradient_accumulation_steps": batch.microbatches,
        "gradient_clipping": config.clip_grad,
    }
    resolved, words = dict(content), []
    for key, value in derived.items():
        given = content.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(f'{key}={given}: the command line gives {value}; write "auto"')
        if given == "auto":
            words.append(f"{key}={value}")
        resolved[key] = value
    zero = dict(content["zero_optimization"])
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") == "auto":
            zero[key] = BUCKET_ELEMENTS
            words.append(f"zero_optimization.{key}={BUCKET_ELEMENTS}")
    resolved["zero_optimization"] = zero
    autos = [key for key, value in _flat(resolved).items() if value == "auto"]
    if autos:
        raise UserError(f'{autos[0]}="auto": cannot be derived; give a value')
    return resolved, words


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def bundled(name: str) -> str:
    """Path of a configuration of `ds_configs/`, which an installation holds as a package."""
    path = _find_bundled(name)
    assert path, f"{name} is not in ds_configs/"
    return path


def _find_bundled(name: str) -> str | None:
    here = Path(__file__).resolve().parent
    places = [folder / "ds_configs" / name for folder in (here, here.parent)]
    return next((str(path) for path in places if path.is_file()), None)
