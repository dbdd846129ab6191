"""What a run is: frozen pydantic models, checked before any process group starts (no torch here).

Legend: B micro-batch, M micro-batches per step, D replicas (data parallel), G = B * M * D.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from deepmim_scale.errors import UserError

NUM_EVEN_TAPS = 4
# Taps that are still to be spread: a negative count.
UNSET_TAPS = (-NUM_EVEN_TAPS,)
_TAPS_RULE = "must be even, even:N (N from 1) or numbers as 6,8,10,12"


def even_taps(depth: int, num_taps: int) -> tuple[int, ...]:
    """Block numbers (from 1) that cut `depth` blocks into `num_taps` equal runs."""
    return tuple(round(depth * k / num_taps) for k in range(1, num_taps + 1))


def even_alphas(num_taps: int) -> tuple[float, ...]:
    """Shares of raw pixels in hybrid targets, from 0 at the first tap evenly to 1 at the last."""
    return (*(k / (num_taps - 1) for k in range(num_taps - 1)), 1.0)


def _taps_from_words(words: list[str]) -> tuple[int, ...]:
    # `even` cannot be spread before the depth is known: it travels as a negative count.
    text = ",".join(words)
    even = re.fullmatch("even(:([1-9][0-9]*))?", text)
    if even:
        return (-int(even[2] or NUM_EVEN_TAPS),)
    try:
        return tuple(int(number) for number in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"taps={text}: {_TAPS_RULE}") from None


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


def _require(condition: bool, key: str, value: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value}: {rule}")


def _divides(key: str, value: int, name: str, divisor: int) -> None:
    below = value // divisor * divisor
    near = f"{below} or {below + divisor}" if below else str(divisor)
    rule = f"must be divisible by {name}={divisor}; e.g. {near}"
    _require(value % divisor == 0, key, value, rule)


class FrozenConfig(BaseModel):
    """Base of all settings: immutable, finite, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*")
    @classmethod
    def _finite(cls, value: Any, info: Any) -> Any:
        finite = not isinstance(value, float) or math.isfinite(value)
        _require(finite, info.field_name, value, "must be finite")
        return value


class ModelConfig(FrozenConfig):
    """Encoder, decoders, mask and loss of one model."""

    method: Literal["mae", "deepmim", "mirl"] = "deepmim"
    """mae: one decoder at the end; deepmim: one after each tap; mirl: pairs of segments."""
    loss: Literal["pixel", "cosine"] = "pixel"
    """pixel: mean squared error; cosine: 2 - 2 cos to a teacher's token features (DeepMIM-CLIP)."""
    norm_pix: bool = True
    """Normalize the pixels of each target patch (better features; off for better pictures)."""
    img_size: int = 224
    """Side of the square input image, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    in_chans: int = 3
    """Channels of an image."""
    embed_dim: int = 768
    """Encoder width."""
    depth: int = 12
    """Encoder blocks."""
    num_heads: int = 12
    """Attention heads of an encoder block."""
    mlp_ratio: float = 4.0
    """Hidden width of every MLP divided by its block's width."""
    decoder_embed_dim: int = 512
    """Decoder width."""
    decoder_depth: int = 4
    """Blocks of each decoder."""
    decoder_num_heads: int = 16
    """Attention heads of a decoder block."""
    mask_ratio: float = 0.75
    """Share of patches removed; int(num_patches * (1 - mask_ratio)) stay visible, as in MAE."""
    num_segments: int = 6
    """MIRL: equal runs of blocks; segment g is paired with segment num_segments + 1 - g."""
    taps: Taps = UNSET_TAPS
    """DeepMIM: numbers (from 1) of the blocks that feed a decoder, or `even` / `even:N`."""
    teacher_dim: int = 512
    """Width of the teacher's features (cosine loss)."""
    hybrid_alphas: tuple[float, ...] = ()
    """Share of raw pixels in each tap's target (default: all raw, with --hybrid 0 to 1 evenly)."""
    masked_query: bool = True
    """Run the last decoder block for the masked tokens only: exact, fewer FLOPs."""

    @field_validator("taps", mode="before")
    @classmethod
    def _spread_taps(cls, value: Any, info: Any) -> Any:
        data = info.data
        if "depth" not in data or "method" not in data or "num_segments" not in data:
            return (1,)  # another key is wrong already and is reported first
        if isinstance(value, str):
            value = _taps_from_words([value])
        try:
            value, depth = tuple(map(operator.index, value)), data["depth"]
        except TypeError:
            raise ValueError(f"taps={value}: {_TAPS_RULE}") from None
        even = len(value) == 1 and value[0] < 0
        expected: tuple[int, ...]
        if data["method"] == "mae":
            expected, rule = (depth,), "mae has one decoder, after the last block"
        elif data["method"] == "mirl":
            expected, rule = even_taps(depth, data["num_segments"]), "mirl taps end its segments"
        elif not even:
            return value
        else:
            _require(
                -value[0] <= depth,
                "taps",
                f"even:{-value[0]}",
                f"more decoders than blocks; use at most even:{depth} (depth)",
            )
            return even_taps(depth, -value[0])
        if not even and value != expected:
            raise ValueError(f"taps={value}: {rule}: use {expected} or leave taps out")
        return expected

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for key in (
            "img_size",
            "patch_size",
            "in_chans",
            "embed_dim",
            "depth",
            "num_heads",
            "decoder_embed_dim",
            "decoder_depth",
            "decoder_num_heads",
            "num_segments",
            "teacher_dim",
        ):
            _require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        _divides("img_size", self.img_size, "patch_size", self.patch_size)
        _divides("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        _divides(
            "decoder_embed_dim", self.decoder_embed_dim, "decoder_num_heads", self.decoder_num_heads
        )
        for key in ("embed_dim", "decoder_embed_dim"):
            _divides(key, getattr(self, key), "the position table's 4 parts", 4)
        _require(
            min(self.embed_dim, self.decoder_embed_dim) * self.mlp_ratio >= 1,
            "mlp_ratio",
            self.mlp_ratio,
            "leaves an MLP without hidden units; papers use 4",
        )
        taps = ",".join(map(str, self.taps))
        increasing = all(a < b for a, b in zip(self.taps, self.taps[1:], strict=False))
        _require(
            bool(self.taps) and self.taps[0] >= 1 and increasing,
            "taps",
            taps,
            "must be increasing block numbers from 1; use --taps even",
        )
        _require(
            self.taps[-1] == self.depth,
            "taps",
            taps,
            f"must end at block {self.depth} (depth), so that every block is trained; "
            "use --taps even",
        )
        _require(
            0 < self.num_visible < self.num_patches,
            "mask_ratio",
            self.mask_ratio,
            f"leaves {self.num_visible} of {self.num_patches} patches visible; "
            "at least one must be visible and one masked",
        )
        if self.hybrid_alphas:
            alphas = ",".join(f"{alpha:g}" for alpha in self.hybrid_alphas)
            _require(
                self.method == "deepmim" and self.loss == "pixel",
                "hybrid_alphas",
                alphas,
                "hybrid targets are for method deepmim and loss pixel",
            )
            _require(
                len(self.hybrid_alphas) == len(self.taps),
                "hybrid_alphas",
                alphas,
                f"must be {len(self.taps)} numbers, one per tap",
            )
            _require(
                all(0 <= alpha <= 1 for alpha in self.hybrid_alphas),
                "hybrid_alphas",
                alphas,
                "must lie in [0, 1]",
            )
        if self.method == "mirl":
            _divides("depth", self.depth, "num_segments", self.num_segments)
            _divides("num_segments", self.num_segments, "segments of a pair", 2)
            _require(self.loss == "pixel", "loss", self.loss, "mirl is defined for loss pixel")
        return self

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
        """Width of a prediction: pixels of a patch, or the teacher's width."""
        if self.loss == "cosine":
            return self.teacher_dim
        return self.in_chans * self.patch_size**2


class RunConfig(FrozenConfig):
    """One pre-training run."""

    preset: str = ""
    """The preset this run started from."""
    model: ModelConfig = ModelConfig()
    teacher: str = "ViT-B-16-quickgelu"
    """Loss cosine: open_clip model, or local-dir:FOLDER; OpenAI's weights need QuickGELU."""
    teacher_weights: str = "openai"
    """Loss cosine: an open_clip tag (downloaded at the start), or a state-dict file."""
    hybrid: str = ""
    """DeepMIM's hybrid targets: a run of method mae whose reconstructions are mixed in."""
    data: str = ""
    """Image folder: DIR/train/<class>/*.jpg (DIR/val beside it is validation), or DIR itself."""
    cache: str = ""
    """Folder for listings of the data (default: beside the images)."""
    output: str = ""
    """Folder of the run (default runs/<preset>)."""
    deepspeed_config: str = ""
    """DeepSpeed JSON, e.g. ds_configs/a100_bf16.json (default: by what the machine has)."""
    epochs: float = 800.0
    """Length of the run and of the learning-rate schedule, epochs."""
    steps: int | None = None
    """Length in optimizer steps; replaces epochs."""
    seed: int = 0
    """Seed of weights, order, crops, flips and masks."""
    microbatch_size: int = 64
    """B, images per micro-batch and replica."""
    microbatches: int | None = None
    """M, micro-batches per step (= gradient_accumulation_steps)."""
    global_batch: int | None = 4096
    """G = B * M * replicas, images per step; drives the learning rate."""
    blr: float = 1.5e-4
    """Base learning rate: lr = blr * global_batch / 256."""
    warmup_epochs: float = 40.0
    """Linear warm-up from 0, epochs; then a half-cosine to 0."""
    weight_decay: float = 0.05
    """AdamW weight decay; none for biases and other 1-D parameters."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.95
    """AdamW beta 2."""
    eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 0.0
    """Largest global gradient norm; 0 clips nothing, as in the papers."""
    optimizer: Literal["adamw", "apex"] = "adamw"
    """torch's AdamW (fused on a GPU), or NVIDIA apex's FusedAdam where it is installed."""
    stages: int = 1
    """P, pipeline stages as ranks; the rest of the processes are replicas."""
    schedule: Literal["gpipe", "1f1b", "dib", "dib_w"] = "dib"
    """Order of work; dib runs decoders while a stage would wait, dib_w weight gradients too."""
    placement: Literal["linear", "v"] = "linear"
    """v: rank r holds stages r and 2P - 1 - r, so that MIRL's pairs stay on one device."""
    layout: str = ""
    """Stages as 6d|2d|2d|2d: blocks, and d for a decoder (default: the fastest cut)."""
    reschedule_after: int = 0
    """Step after which the schedule is rebuilt from measured times; 0 keeps the predicted one."""
    gradient_flow: Literal["full", "local"] = "full"
    """local: no gradient crosses a stage boundary; a different algorithm."""
    recompute: Literal["none", "encoder", "all"] = "none"
    """Keep inputs only of encoder blocks (all: and of decoders) and run them again: exact."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Fused Triton kernels where the GPU has them, always, or plain torch."""
    compile: bool = False
    """Compile encoder and decoder blocks one by one with torch.compile."""
    timeout: float = 600.0
    """Longest wait for another process, s."""
    reduction: Literal["coalesced", "per_microbatch"] = "coalesced"
    """Reduce gradients once per step (they stay full until then), or after every micro-batch."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """Who decodes the images."""
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    """Where JPEG is decoded; mixed uses the GPU (DALI)."""
    loader_threads: int = 2
    """Decoding threads per process."""
    prefetch: int = 2
    """Micro-batches being decoded at once."""
    feed: Literal["rotate", "first", "replicate"] = "rotate"
    """Who decodes for a pipeline's stages: each its share, the first, or each everything."""
    check_feed: int = 0
    """Steps between comparisons of the stages' images; 0 never."""
    on_bad: Literal["fail", "replace"] = "fail"
    """A file that cannot be decoded stops the run by name, or the next sample replaces it."""
    min_crop: float = 0.2
    """Smallest area of a random crop, as a share of the image."""
    validate_every: float = 1.0
    """Epochs between validation losses (needs DIR/val); 0 never."""
    save_every: int = 1000
    """Steps between checkpoints, and one after the last step; 0 never."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    print_every: int = 20
    """Steps between printed lines; metrics.jsonl has every step."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto: go on where this run stopped; never: only in an empty folder; required: only so."""
    profile: bool = False
    """Write a torch.profiler trace of steps 11 to 13 to the run's folder."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for key in (
            "stages",
            "timeout",
            "microbatch_size",
            "loader_threads",
            "keep_checkpoints",
            "print_every",
            "prefetch",
            "epochs",
            "eps",
        ):
            _require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        for key in ("steps", "microbatches", "global_batch"):
            value = getattr(self, key)
            _require(value is None or value > 0, key, value, "must be positive")
        for key in (
            "blr",
            "warmup_epochs",
            "weight_decay",
            "clip_grad",
            "validate_every",
            "check_feed",
            "reschedule_after",
            "save_every",
        ):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "must lie in [0, 2**31)")
        _require(
            self.model.in_chans == 3,
            "in_chans",
            self.model.in_chans,
            "images are read as RGB; leave it at 3",
        )
        for key in ("beta1", "beta2"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "must lie in [0, 1)")
        _require(
            not (self.compile and self.schedule == "dib_w"),
            "compile",
            True,
            "dib_w queues weight gradients in Python; use schedule dib",
        )
        alphas = self.model.hybrid_alphas
        _require(
            bool(self.hybrid) or not alphas,
            "hybrid_alphas",
            alphas,
            "need a run of method mae; give --hybrid RUN",
        )
        _require(0 < self.min_crop <= 1, "min_crop", self.min_crop, "must lie in (0, 1]")
        return self


def pluralize(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun, as `1 replica`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def validated(build: Callable[[], Any]) -> Any:
    """Run `build` (which makes a config) and turn pydantic's report into one UserError line."""
    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":  # pydantic's own report: key and value are beside it
            key = ".".join(str(part) for part in first["loc"])
            message = f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"
        raise UserError(message) from None


def num_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    return config.steps if config.steps is not None else round(config.epochs * steps_per_epoch)
