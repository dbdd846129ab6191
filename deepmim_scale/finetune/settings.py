"""What a fine-tuning run is: frozen and checked before any process group starts (no torch here).

Legend: B micro-batch, M micro-batches per step, D replicas, G = B * M * D, K classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from deepmim_scale.config import FromStep, MicrobatchCount, Size
from deepmim_scale.methods.base import require
from deepmim_scale.operation import Operation
from deepmim_scale.settings import (
    File,
    Folder,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    shown_as,
)

OptionalSize = Annotated[Size | None, shown_as("INT")]
Share = Annotated[float, Field(ge=0, le=1)]
WEIGHTS_HELP = "RUN|CHECKPOINT|FILE"


class FinetuneConfig(Operation):
    """One fine-tuning run: an encoder of any origin learns the classes of an image folder."""

    weights: Annotated[tyro.conf.Positional[str], shown_as(WEIGHTS_HELP)] = ""
    """A run, its checkpoint, or a file of weights; without it training starts from scratch."""
    from_step: FromStep = ""
    """The run's checkpoint, as step_00000800 or 800 (default: the newest intact one)."""
    preset: Annotated[str, shown_as("NAME")] = ""
    """The recipe this run started from."""
    data: Folder = ""
    """Folder with train/<class> and val/<class>."""
    cache: Folder = ""
    """Folder for listings of the data (default: beside the images)."""
    output: Folder = ""
    """Folder of the run (default runs/<preset>)."""
    deepspeed_config: File = ""
    """DeepSpeed JSON, e.g. ds_configs/a100_bf16.json (default: by what the machine has)."""
    evaluates_only: Annotated[bool, tyro.conf.arg(name="eval")] = False
    """Only count what a fine-tuned model gets right; trains and writes nothing."""
    img_size: OptionalSize = None
    """Side of the input, pixels; another than the weights' resizes the position table."""
    patch_size: OptionalSize = None
    """Side of a patch, pixels (default: the weights', as of the next four)."""
    embed_dim: OptionalSize = None
    """Width."""
    depth: Annotated[Annotated[int, Field(gt=0, le=1024)] | None, shown_as("INT")] = None
    """Blocks."""
    num_heads: OptionalSize = None
    """Attention heads of a block; a file that does not tell them has heads of 64."""
    mlp_ratio: Annotated[Annotated[float, Field(gt=0, le=64)] | None, shown_as("FLOAT")] = None
    """Hidden width of an MLP divided by the width."""
    pool: Literal["mean", "class"] = "mean"
    """What the head reads: the normed mean of the patch tokens, or the class token."""
    head: Literal["auto", "new"] = "auto"
    """auto: keep the head that a fine-tuned file has; new: begin with a new one."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples that skip the last block's branches; rises linearly from 0."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    """Length of the run and of the learning-rate schedule, epochs."""
    steps: Annotated[Annotated[int, Field(gt=0, le=10**9)] | None, shown_as("INT")] = None
    """Length in optimizer steps; replaces epochs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of head, order, augmentation, mixing and drop path."""
    microbatch_size: Annotated[int, Field(gt=0, le=65536)] = 32
    """B, images per micro-batch and replica."""
    microbatches: Annotated[MicrobatchCount | None, shown_as("INT")] = None
    """M, micro-batches per step (= gradient_accumulation_steps)."""
    global_batch: Annotated[PositiveInt | None, shown_as("INT")] = 1024
    """G = B * M * replicas, images per step; drives the learning rate."""
    blr: Annotated[float, Field(gt=0, le=1000)] = 5e-4
    """Base learning rate: lr = blr * global_batch / 256."""
    min_lr: NonNegativeFloat = 1e-6
    """Where the half-cosine ends, before layer decay."""
    warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] = 5.0
    """Linear warm-up from 0, epochs."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Every block learns at this share of the next one's rate."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW weight decay; none for 1-D parameters, class token and position table."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW beta 1."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW beta 2."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""
    clip_grad: NonNegativeFloat = 0.0
    """Largest global gradient norm; 0 clips nothing, as in the papers."""
    optimizer: Annotated[str, tyro.conf.arg(metavar="adamw|apex")] = "adamw"
    """torch's AdamW (fused on a GPU), or NVIDIA apex's FusedAdam where it is installed."""
    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup; 0 switches it off."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of cutmix; 0 switches it off. With both a fair coin decides for each micro-batch."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing."""
    auto_augment: Annotated[str, shown_as("POLICY")] = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment policy; '' for none."""
    erase: Share = 0.25
    """Share of images in which a box is erased by noise."""
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest area of a random crop, as a share of the image."""
    flip: Share = 0.5
    """Share of images that are mirrored."""
    crop_share: Share = 0.0
    """Share of the short side seen in evaluation; 0 takes 0.875, and 1 for inputs above 224."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Moving average of the weights, evaluated beside them; MIRL's is 0.9998, 0 has none."""
    top: Annotated[PositiveInt | None, shown_as("INT")] = None
    """Also count where the class is among so many likeliest (default 5, or K if fewer)."""
    reduction: Literal["coalesced", "per_microbatch"] = "coalesced"
    """Reduce gradients once per step (they stay full until then), or after every micro-batch."""
    loader_workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Processes that decode and augment for each rank; 0 leaves it to the rank itself."""
    on_bad: Literal["fail", "replace"] = "fail"
    """A training file that cannot be decoded stops the run, or the next sample replaces it."""
    validate_every: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Epochs between evaluations; there is one after the last step."""
    keep_checkpoints: PositiveInt = 1
    """Newest checkpoints kept."""

    @property
    def mixes(self) -> bool:
        """Whether images of a micro-batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        known = ("adamw", "apex")
        rule = "needs whole tensors, which ZeRO-2 splits; use adamw, or evaluate linear-sgd"
        require(self.optimizer.lower() != "lars", "optimizer", self.optimizer, rule)
        require(
            self.optimizer in known,
            "optimizer",
            self.optimizer,
            f"must be one of {', '.join(known)}",
        )
        rule = "mixup and cutmix pair the images of a micro-batch; give an even number"
        even = self.microbatch_size % 2 == 0
        require(even or not self.mixes, "microbatch_size", self.microbatch_size, rule)
        require(
            not self.auto_augment or self.auto_augment.startswith("rand-"),
            "auto_augment",
            self.auto_augment,
            "must be a RandAugment policy, as rand-m9-mstd0.5-inc1, or ''",
        )
        return self
