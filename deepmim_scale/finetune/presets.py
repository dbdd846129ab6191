"""Published fine-tuning recipes as functions: call one, then `replace(...)` what differs.

Sources: FINETUNE.md of facebookresearch/mae, the released logs and commands of
OliverRensu/DeepMIM, and the commands of russellllaputa/MIRL. ImageNet-1k at 224 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepmim_scale.errors import UserError
from deepmim_scale.finetune.settings import FinetuneConfig

_PATCH_16: dict[str, Any] = {"img_size": 224, "patch_size": 16, "mlp_ratio": 4.0}
VIT_S: dict[str, Any] = {"embed_dim": 384, "num_heads": 12, **_PATCH_16}
VIT_B: dict[str, Any] = {"embed_dim": 768, "num_heads": 12, **_PATCH_16}
VIT_L: dict[str, Any] = {"embed_dim": 1024, "num_heads": 16, **_PATCH_16}
VIT_H: dict[str, Any] = {"embed_dim": 1280, "num_heads": 16, **_PATCH_16, "patch_size": 14}
EMA = 0.9998


def finetune_mae_b() -> FinetuneConfig:
    """MAE ViT-B/16, 1600 epochs of pre-training: 83.66 %."""
    return FinetuneConfig(depth=12, layer_decay=0.65, **VIT_B)


def finetune_mae_l() -> FinetuneConfig:
    """MAE ViT-L/16: 85.95 %."""
    return FinetuneConfig(depth=24, epochs=50.0, blr=1e-3, drop_path=0.2, **VIT_L)


def finetune_mae_h() -> FinetuneConfig:
    """MAE ViT-H/14: 86.93 %."""
    return FinetuneConfig(depth=32, epochs=50.0, blr=1e-3, drop_path=0.3, **VIT_H)


def finetune_deepmim_b() -> FinetuneConfig:
    """DeepMIM ViT-B/16 on pixels, 84.2 %: its recipe is not released, so this is MAE's."""
    return finetune_mae_b()


def finetune_deepmim_clip_b() -> FinetuneConfig:
    """DeepMIM ViT-B/16 on CLIP features: 85.55 % at the best epoch, 85.50 at the last."""
    return FinetuneConfig(depth=12, blr=1e-4, layer_decay=0.6, **VIT_B)


def _mirl(**fields: Any) -> FinetuneConfig:
    return FinetuneConfig(blr=7.5e-4, global_batch=2048, layer_decay=0.88, ema_decay=EMA, **fields)


def finetune_mirl_b_48() -> FinetuneConfig:
    """MIRL ViT-B-48: 86.2 % after 800 epochs of pre-training, 85.3 after 300."""
    return _mirl(
        depth=48, epochs=60.0, warmup_epochs=30.0, drop_path=0.0, microbatch_size=16, **VIT_B
    )


def finetune_mirl_s_54() -> FinetuneConfig:
    """MIRL ViT-S-54: 84.8 % after 800 epochs of pre-training, 84.4 after 300."""
    return _mirl(depth=54, warmup_epochs=20.0, microbatch_size=64, **VIT_S)


FINETUNE_PRESETS: dict[str, Callable[[], FinetuneConfig]] = {
    function.__name__: function
    for function in (
        finetune_mae_b,
        finetune_mae_l,
        finetune_mae_h,
        finetune_deepmim_b,
        finetune_deepmim_clip_b,
        finetune_mirl_b_48,
        finetune_mirl_s_54,
    )
}


def load_finetune_preset(name: str) -> FinetuneConfig:
    """The preset's config with its name filled in; UserError lists the names there are."""
    if name not in FINETUNE_PRESETS:
        known = ", ".join(FINETUNE_PRESETS)
        raise UserError(f"preset={name}: unknown; choose one of {known}")
    return FINETUNE_PRESETS[name]().replace(preset=name)
