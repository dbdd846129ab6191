"""What a run is: frozen pydantic models, checked before any process group starts (no torch here).

Legend: B micro-batch, M micro-batches per step, D replicas (data parallel), G = B * M * D.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from deepmim_scale.methods.base import require
from deepmim_scale.model_config import ModelConfig, Size
from deepmim_scale.operation import Operation
from deepmim_scale.settings import (
    File,
    Folder,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunLength,
    shown_as,
)

__all__ = ["FromStep", "MicrobatchCount", "ModelConfig", "RunConfig", "Size"]

MAX_MICROBATCHES = 4096
"""Of a step; schedules of more take minutes to build and gain nothing."""
MicrobatchCount = Annotated[int, Field(gt=0, le=MAX_MICROBATCHES)]
FromStep = Annotated[str, shown_as("STEP", name="from")]


class RunConfig(Operation):
    """One pre-training run."""

    preset: Annotated[str, shown_as("NAME")] = ""
    """The preset this run started from."""
    model: ModelConfig = ModelConfig()
    teacher_weights: Annotated[str, shown_as("TAG|FILE")] = "openai"
    """Target clip: an open_clip tag (downloaded at the start), or a state-dict file."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Target ema: share of the teacher's weights that a step keeps."""
    data: Folder = ""
    """DIR/train/<class> (DIR/val for validation), DIR itself, .tar, .zip, .parquet or many such."""
    cache: Folder = ""
    """Folder for listings of the data (default: beside the images)."""
    stage_to: Folder = ""
    """Folder on each node's own disk that the data are copied to first (default: no copy)."""
    output: Folder = ""
    """Folder of the run (default runs/<preset>)."""
    deepspeed_config: File = ""
    """DeepSpeed JSON, e.g. ds_configs/a100_bf16.json (default: by what the machine has)."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 800.0
    """Length of the run and of the learning-rate schedule, epochs."""
    steps: Annotated[Annotated[int, Field(gt=0, le=10**9)] | None, shown_as("INT")] = None
    """Length in optimizer steps; replaces epochs."""
    init_from: Annotated[str, shown_as("RUN|CHECKPOINT|FILE")] = ""
    """Begin with these weights: a run's, or the encoder of any file that `finetune` takes."""
    init_depth: Literal["same", "stack", "interleave"] = "same"
    """Fill a deeper encoder with the blocks in turn (1 2 1 2), or each repeated (1 1 2 2)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, order, crops, flips and masks."""
    microbatch_size: Annotated[int, Field(gt=0, le=65536)] = 64
    """B, images per micro-batch and replica."""
    microbatches: Annotated[MicrobatchCount | None, shown_as("INT")] = None
    """M, micro-batches per step (= gradient_accumulation_steps)."""
    global_batch: Annotated[PositiveInt | None, shown_as("INT")] = 4096
    """G = B * M * replicas, images per step; drives the learning rate."""
    blr: Annotated[float, Field(gt=0, le=1000)] = 1.5e-4
    """Base learning rate: lr = blr * global_batch / 256."""
    warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] = 40.0
    """Linear warm-up from 0, epochs; then a half-cosine to 0."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """wsd: after the warm-up the rate stays, and falls to 0 at the end; a run can be extended."""
    decay_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """wsd: share of the run, at its end, in which the rate falls."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW weight decay; none for biases and other 1-D parameters."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW beta 1."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW beta 2."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""
    clip_grad: NonNegativeFloat = 0.0
    """Largest global gradient norm; 0 clips nothing, as in the papers."""
    optimizer: Literal["adamw", "apex"] = "adamw"
    """torch's AdamW (fused on a GPU), or NVIDIA apex's FusedAdam where it is installed."""
    stages: PositiveInt = 1
    """P, pipeline stages as ranks; the rest of the processes are replicas."""
    schedule: Annotated[str, tyro.conf.arg(metavar="gpipe|1f1b|dib|dib_w")] = "dib"
    """Order of work; dib runs decoders while a stage would wait, dib_w weight gradients too."""
    schedule_file: File = ""
    """A schedule as `deepmim-scale schedule --json` writes it, or made by hand."""
    placement: Literal["linear", "v"] = "linear"
    """v: rank r holds stages r and 2P - 1 - r, so that MIRL's pairs stay on one device."""
    layout: Annotated[str, shown_as("STAGE/STAGE/...")] = ""
    """Stages as 6d/2d/2d/2d: blocks, and d for a decoder (default: the fastest cut)."""
    reschedule_after: NonNegativeInt = 0
    """Step after which the schedule is rebuilt from measured times; 0 keeps the predicted one."""
    gradient_flow: Literal["full", "local"] = "full"
    """local: no gradient crosses a stage boundary; a different algorithm."""
    recompute: Literal["none", "encoder", "all"] = "none"
    """Keep inputs only of encoder blocks (all: and of decoders) and run them again: exact."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Fused Triton kernels where the GPU has them, always, or plain torch."""
    compile: bool = False
    """Compile encoder and decoder blocks one by one with torch.compile."""
    reduction: Literal["overlapped", "coalesced", "per_microbatch"] = "overlapped"
    """Sum gradients over replicas part by part while the last micro-batch is still running, once at
    the end of the step, or after every micro-batch, so that only shards are kept."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """Who decodes the images."""
    decode: Literal["auto", "exact", "cpu", "fast", "mixed"] = "auto"
    """How JPEG is decoded: exact or cpu with all pixels, fast at a fraction, mixed on the GPU."""
    loader_threads: Annotated[Annotated[int, Field(gt=0, le=1024)] | None, shown_as("INT")] = None
    """Decoding threads per process; if not given, the host's cores over its processes."""
    prefetch: Annotated[int, Field(gt=0, le=1024)] = 2
    """Micro-batches being decoded at once."""
    feed: Literal["rotate", "first", "replicate"] = "rotate"
    """Who decodes for a pipeline: every stage its share, stage 0 only, or every stage all."""
    check_feed: NonNegativeInt = 0
    """Steps between comparisons of the stages' images; 0 never."""
    on_bad: Literal["fail", "replace"] = "fail"
    """A file that cannot be decoded stops the run by name, or the next sample replaces it."""
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest area of a random crop, as a share of the image."""
    validate_every: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Epochs between validation losses (needs DIR/val); 0 never."""
    keep_every: NonNegativeInt = 0
    """Checkpoints after every so many steps are kept for good; 0 keeps the newest only."""
    log_every: PositiveInt = 1
    """Steps between rows of metrics; a step without a row waits for the device once."""
    log_blocks: NonNegativeInt = 0
    """Steps between rows with the residual stream and gradient norm of every block; 0 never."""
    from_step: FromStep = ""
    """Go on from this checkpoint, as step_00000800, 800 or latest; later ones are set aside."""
    trace: NonNegativeInt = 0
    """Step whose instructions are written as they ran, on all ranks, as a Chrome trace; 0 none."""
    profile: bool = False
    """Write a torch.profiler trace of steps 11 to 13 to the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        """Older names: the teacher stood beside the model; `hybrid` named the run it is."""
        if not isinstance(values, dict) or not values.keys() & {"teacher", "hybrid"}:
            return values
        values = dict(values)
        teacher, hybrid = values.pop("teacher", ""), values.pop("hybrid", "")
        model = values.get("model", {})
        if not isinstance(model, dict | ModelConfig):
            return values | {"model": model}  # pydantic says what it must be
        changes = {"target": "hybrid", "teacher": hybrid} if hybrid else {"teacher": teacher}
        return values | {"model": dict(model) | changes}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        rule = "a compiled block cannot be looked into; leave one of the two out"
        require(not (self.compile and self.log_blocks), "log_blocks", self.log_blocks, rule)
        every = self.save_every
        require(
            not self.keep_every or (every > 0 and self.keep_every % every == 0),
            "keep_every",
            self.keep_every,
            f"must be a multiple of save_every={every}; change one of the two",
        )
        return self


def num_steps(config: RunLength, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    return config.steps if config.steps is not None else round(config.epochs * steps_per_epoch)
