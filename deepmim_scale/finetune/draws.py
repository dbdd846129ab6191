"""Seeds of everything random in fine-tuning: functions of where it happens, not of who does it.

timm and torch draw from the global streams of `random`, numpy and torch. They are set anew for
each image and for each micro-batch, so that results depend neither on the number of processes nor
on interruptions.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from deepmim_scale.data.philox import AUGMENT, DROP_PATH, MIX, philox


def seed_sample(seed: int, epoch: int, sample_id: int) -> None:
    """Before the augmentation of one image."""
    a, b, c, d = (int(lane) for lane in philox(seed, 0, sample_id, epoch, AUGMENT))
    random.seed(a << 32 | b)
    np.random.seed(c)  # noqa: NPY002  timm draws from it
    torch.manual_seed(d)


def seed_mixing(seed: int, step: int, part: int) -> None:
    """Before mixing the images of micro-batch `part` of a step, counted over all replicas."""
    np.random.seed(int(philox(seed, part, step, 0, MIX)[0]))  # noqa: NPY002  timm draws from it


def seed_drop_path(seed: int, step: int, part: int) -> None:
    """Before the forward pass of micro-batch `part`, on the CPU and on every GPU."""
    a, b, _, _ = (int(lane) for lane in philox(seed, part, step, 0, DROP_PATH))
    torch.manual_seed(a << 32 | b)
