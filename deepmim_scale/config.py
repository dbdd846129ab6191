"""What a run is: frozen pydantic models, checked before any process group starts (no torch here).

Legend: B micro-batch, M micro-batches per step, D replicas (data parallel), G = B * M * D.
"""

from __future__ import annotations

import operator
import re
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, field_validator, model_validator

from deepmim_scale.errors import UserError
from deepmim_scale.methods import METHODS, method_of
from deepmim_scale.methods.base import require, require_divisible
from deepmim_scale.objectives import ALIASES, find_objective, objective_of
from deepmim_scale.settings import (
    File,
    Folder,
    FrozenConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunLength,
    shown_as,
)

NUM_EVEN_TAPS = 4
# Taps that are still to be spread: a negative count.
UNSET_TAPS = (-NUM_EVEN_TAPS,)
_TAPS_RULE = "must be even, even:N (N from 1) or numbers as 6,8,10,12"

MAX_MICROBATCHES = 4096
"""Of a step; schedules of more take minutes to build and gain nothing."""
MicrobatchCount = Annotated[int, Field(gt=0, le=MAX_MICROBATCHES)]
Size = Annotated[int, Field(gt=0, le=65536)]
"""Pixels, widths and heads: beyond is a slip of the keyboard."""


def _taps_from_words(words: list[str]) -> tuple[int, ...]:
    # `even` cannot be spread before the depth is known: it travels as a negative count.
    text = ",".join(words)
    even = re.fullmatch("even(:([1-9][0-9]{0,3}))?", text)
    if even:
        return (-int(even[2] or NUM_EVEN_TAPS),)
    try:
        return tuple(int(number) for number in text.replace(", ", ",").split(","))
    except ValueError:
        raise UserError(f"taps={text}: {_TAPS_RULE}") from None


FromStep = Annotated[str, shown_as("STEP", name="from")]
Taps = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="even|even:N|6,8,10,12",
        instance_from_str=_taps_from_words,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


class ModelConfig(FrozenConfig):
    """Encoder, decoders, mask and target of one model."""

    method: Annotated[str, tyro.conf.arg(metavar="mae|deepmim|mirl")] = "deepmim"
    """mae: one decoder at the end; deepmim: one after each tap; mirl: pairs of segments."""
    target: Annotated[str, tyro.conf.arg(metavar="pixel|clip|hybrid|hog|ema|timm:NAME")] = "pixel"
    """What decoders predict: pixels, features of a teacher, or HOG; `--loss` is an alias."""
    teacher: Annotated[str, shown_as("NAME|FILE|RUN")] = ""
    """clip: open_clip model, local-dir:FOLDER or weights; timm:NAME: weights; hybrid: a run."""
    norm_pix: bool = True
    """Normalize the pixels of each target patch (better features; off for better pictures)."""
    img_size: Size = 224
    """Side of the square input image, pixels."""
    patch_size: Size = 16
    """Side of a patch, pixels."""
    in_chans: Size = 3
    """Channels of an image."""
    embed_dim: Size = 768
    """Encoder width."""
    depth: Annotated[int, Field(gt=0, le=1024)] = 12
    """Encoder blocks."""
    num_heads: Size = 12
    """Attention heads of an encoder block."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of every MLP divided by its block's width."""
    decoder_embed_dim: Size = 512
    """Decoder width."""
    decoder_depth: Annotated[int, Field(gt=0, le=1024)] = 4
    """Blocks of each decoder."""
    decoder_num_heads: Size = 16
    """Attention heads of a decoder block."""
    mask_ratio: float = 0.75
    """Share of patches removed; int(num_patches * (1 - mask_ratio)) stay visible, as in MAE."""
    num_segments: Annotated[int, Field(gt=0, le=1024)] = 6
    """MIRL: equal runs of blocks; segment g is paired with segment num_segments + 1 - g."""
    taps: Taps = UNSET_TAPS
    """DeepMIM: numbers (from 1) of the blocks that feed a decoder, or `even` / `even:N`."""
    teacher_dim: Size = 512
    """Width of the teacher's features (targets clip and timm:NAME)."""
    hybrid_alphas: Annotated[tuple[float, ...], shown_as("FLOAT ...")] = ()
    """Share of raw pixels in each tap's hybrid target (default: evenly from 0 to 1)."""
    masked_query: bool = True
    """Run the last decoder block for the masked tokens only: exact, fewer FLOPs."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        """Older names: `loss` for the target; shares of pixels alone meant hybrid targets."""
        if isinstance(values, dict):
            values = dict(values)
            if "loss" in values:
                values["target"] = values.pop("loss")
            target = values.get("target", "pixel")
            if values.get("hybrid_alphas") and target == "pixel":
                target = "hybrid"
            values["target"] = ALIASES.get(target, target) if isinstance(target, str) else target
        return values

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        names = ", ".join(METHODS)
        require(value in METHODS, "method", value, f"unknown; choose one of {names}")
        return value

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str) -> str:
        find_objective(value)
        return value

    @field_validator("taps", mode="before")
    @classmethod
    def _spread_taps(cls, value: Any, info: Any) -> Any:
        data = info.data
        if "depth" not in data or "method" not in data or "num_segments" not in data:
            return (1,)  # another key is wrong already and is reported first
        if isinstance(value, str):
            value = _taps_from_words([value])
        try:
            value = tuple(map(operator.index, value))
        except TypeError:
            raise ValueError(f"taps={value}: {_TAPS_RULE}") from None
        return METHODS[data["method"]].taps(data["depth"], data["num_segments"], value)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        require_divisible("img_size", self.img_size, "patch_size", self.patch_size)
        require_divisible("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        require_divisible(
            "decoder_embed_dim",
            self.decoder_embed_dim,
            "decoder_num_heads",
            self.decoder_num_heads,
        )
        for key in ("embed_dim", "decoder_embed_dim"):
            require_divisible(key, getattr(self, key), "the position table's 4 parts", 4)
        require(
            min(self.embed_dim, self.decoder_embed_dim) * self.mlp_ratio >= 1,
            "mlp_ratio",
            self.mlp_ratio,
            "leaves an MLP without hidden units; papers use 4",
        )
        self._check_taps()
        rule = (
            f"leaves {self.num_visible} of {self.num_patches} patches visible; "
            "at least one must be visible and one masked"
        )
        visible = 0 < self.num_visible < self.num_patches
        require(visible, "mask_ratio", self.mask_ratio, rule)
        method, objective = method_of(self), objective_of(self)
        method.check(self)
        if self.hybrid_alphas:
            alphas = ",".join(f"{alpha:g}" for alpha in self.hybrid_alphas)
            in_range = all(0 <= alpha <= 1 for alpha in self.hybrid_alphas)
            require(in_range, "hybrid_alphas", alphas, "must lie in [0, 1]")
            require(self.target == "hybrid", "hybrid_alphas", alphas, "are for target hybrid")
        require(
            objective.sums_pairs or not method.paired,
            "target",
            self.target,
            f"{self.method} is defined for target pixel",
        )
        objective.check_model(self)
        return self

    def _check_taps(self) -> None:
        text = ",".join(map(str, self.taps))
        increasing = all(a < b for a, b in zip(self.taps, self.taps[1:], strict=False))
        require(
            bool(self.taps) and self.taps[0] >= 1 and increasing,
            "taps",
            text,
            "must be increasing block numbers from 1; use --taps even",
        )
        require(
            self.taps[-1] == self.depth,
            "taps",
            text,
            f"must end at block {self.depth} (depth), so that every block is trained; "
            "use --taps even",
        )

    @property
    def loss(self) -> str:
        """The older name of `target`, with the older name of CLIP's."""
        older = {name: alias for alias, name in ALIASES.items()}
        return older.get(self.target, self.target)

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.img_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """L, patches of an image."""
        return self.grid_size**2

    @property
    def num_visible(self) -> int:
        """Visible patches of an image; truncates in floating point exactly as MAE does."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def out_dim(self) -> int:
        """Width of a prediction."""
        return objective_of(self).width(self)

    @property
    def mix_alphas(self) -> tuple[float, ...]:
        """Share of raw pixels in each tap's hybrid target."""
        return self.hybrid_alphas or even_alphas(len(self.taps))


def even_alphas(num_taps: int) -> tuple[float, ...]:
    """Shares of raw pixels in hybrid targets, from 0 at the first tap evenly to 1 at the last."""
    return (*(k / (num_taps - 1) for k in range(num_taps - 1)), 1.0)


class RunConfig(FrozenConfig):
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
    layout: Annotated[str, shown_as("STAGE|STAGE|...")] = ""
    """Stages as 6d|2d|2d|2d: blocks, and d for a decoder (default: the fastest cut)."""
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
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    """Longest wait for another process, s."""
    reduction: Literal["overlapped", "coalesced", "per_microbatch"] = "overlapped"
    """Sum gradients over replicas part by part while the last micro-batch is still running, once at
    the end of the step, or after every micro-batch, so that only shards are kept."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """Who decodes the images."""
    decode: Literal["auto", "exact", "cpu", "fast", "mixed"] = "auto"
    """How JPEG is decoded: exact or cpu with all pixels, fast at a fraction, mixed on the GPU."""
    loader_threads: Annotated[int, Field(gt=0, le=1024)] = 2
    """Decoding threads per process."""
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
    save_every: NonNegativeInt = 1000
    """Steps between checkpoints, and one after the last step; 0 never."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints after every so many steps are kept for good; 0 keeps the newest only."""
    log_every: PositiveInt = 1
    """Steps between rows of metrics; a step without a row waits for the device once."""
    log_blocks: NonNegativeInt = 0
    """Steps between rows with the residual stream and gradient norm of every block; 0 never."""
    print_every: PositiveInt = 20
    """Steps between printed lines; metrics.jsonl has every step."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto: go on where this run stopped; never: only in an empty folder; required: fail unless
    there is a run to resume."""
    from_step: FromStep = ""
    """Go on from this checkpoint, as step_00000800, 800 or latest; later ones are set aside."""
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
        rule = "images are read as RGB; leave it at 3"
        require(self.model.in_chans == 3, "in_chans", self.model.in_chans, rule)
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
