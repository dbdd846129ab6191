"""Stages of a pipeline in real processes: messages, execution, DeepSpeed's engine."""

import os

import torch

# Before DeepSpeed and CUDA start, which read these once.
# A middle rank has more streams than the 8 hardware queues of a GPU by default; a message that
# nobody takes up yet must not hold up computations in its queue.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# torch 2.15 has a second NCCL backend, whose communicators all ranks must make at once.
os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
