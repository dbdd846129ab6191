"""Trains towards each target, then again from the middle; started by test_targets.py.

Usage: python targets.py DATA OUT TEACHER
"""

from __future__ import annotations

import sys

from deepmim_scale.train.pretrain import main

TINY = (
    "--preset debug --img-size 32 --patch-size 8 --depth 4 --taps 2,4 --embed-dim 16 --num-heads 2 "
    "--decoder-embed-dim 8 --decoder-depth 1 --decoder-num-heads 2 --global-batch 8 "
    "--microbatch-size 4 --steps 6 --save-every 3 --keep-checkpoints 9 --warmup-epochs 0 "
    "--validate-every 0 --loader-threads 1"
)
TEACHER = "timm:vit_tiny_patch16_224"


def targets(teacher: str) -> dict[str, list[str]]:
    """Name of a run -> the flags of its target."""
    flags = ["--target", TEACHER, "--teacher", teacher, "--teacher-dim", "192"]
    return {
        "hog": ["--target", "hog"],
        "timm": [*flags, "--img-size", "64", "--patch-size", "16"],
        "ema": ["--target", "ema", "--ema-decay", "0.9"],
    }


if __name__ == "__main__":
    data, out, teacher = sys.argv[1:]
    for name, flags in targets(teacher).items():
        whole = [*TINY.split(), *flags, "--data", data, "--output", f"{out}/{name}"]
        main(whole)
        main([*whole, "--from", "step_00000003"])
