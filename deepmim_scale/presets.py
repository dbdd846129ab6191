"""Named runs as functions returning configs: call one, then `replace(...)` what differs.

Sources: MAE (facebookresearch/mae, models_mae.py, PRETRAIN.md), DeepMIM (OliverRensu/DeepMIM) and
MIRL (russellllaputa/MIRL, models_mirl.py), whose recipes share batch 4096, blr 1.5e-4, wd 0.05.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.methods.base import even_taps

VIT_S: dict[str, Any] = {"embed_dim": 384, "num_heads": 12}
VIT_B: dict[str, Any] = {"embed_dim": 768, "num_heads": 12}
VIT_L: dict[str, Any] = {"embed_dim": 1024, "num_heads": 16}


def _debug(**model: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 12,
        "num_heads": 4,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
    }
    return RunConfig(
        model=ModelConfig(**(fields | model)),
        microbatch_size=8,
        global_batch=None,
        epochs=10.0,
        warmup_epochs=1.0,
        blr=5e-3,
    )


def debug() -> RunConfig:
    """DeepMIM, 12 small blocks, 4 decoders: seconds on a laptop."""
    return _debug(method="deepmim", taps=(3, 6, 9, 12))


def debug_mae() -> RunConfig:
    """MAE of the size of `debug`."""
    return _debug(method="mae")


def debug_mirl() -> RunConfig:
    """MIRL of the size of `debug`, 6 segments of 2 blocks."""
    return _debug(method="mirl", num_segments=6)


def quickstart() -> RunConfig:
    """DeepMIM on 32-pixel pictures that learns to fill in within minutes on 2 CPU cores."""
    return RunConfig(
        model=ModelConfig(
            method="deepmim",
            norm_pix=False,
            img_size=32,
            patch_size=4,
            embed_dim=64,
            depth=12,
            num_heads=4,
            decoder_embed_dim=48,
            decoder_depth=1,
            decoder_num_heads=3,
            taps=(6, 8, 10, 12),
        ),
        microbatch_size=16,
        global_batch=32,
        epochs=30.0,
        warmup_epochs=3.0,
        blr=0.024,
        validate_every=5.0,
        save_every=500,
        loader_threads=1,
    )


def mae_vit_b_12() -> RunConfig:
    """MAE ViT-B/16: 12 blocks, one decoder of 8 blocks."""
    return RunConfig(model=ModelConfig(method="mae", depth=12, decoder_depth=8, **VIT_B))


def mae_vit_l_24() -> RunConfig:
    """MAE ViT-L/16: 24 blocks, one decoder of 8 blocks."""
    return RunConfig(model=ModelConfig(method="mae", depth=24, decoder_depth=8, **VIT_L))


def deepmim_vit_b_12() -> RunConfig:
    """DeepMIM ViT-B/16 on normalized pixels, decoders after blocks 6, 8, 10 and 12."""
    return _deepmim_vit_b_12()


def _deepmim_vit_b_12(**target: Any) -> RunConfig:
    model = ModelConfig(method="deepmim", depth=12, taps=(6, 8, 10, 12), **VIT_B, **target)
    return RunConfig(model=model, epochs=1600.0)


def deepmim_clip_vit_b_12() -> RunConfig:
    """DeepMIM ViT-B/16 on CLIP token features, as the released code."""
    return _deepmim_vit_b_12(target="clip", teacher_dim=512)


def deepmim_hog_vit_b_12() -> RunConfig:
    """DeepMIM ViT-B/16 on histograms of oriented gradients (MaskFeat's target) at every tap."""
    return _deepmim_vit_b_12(target="hog")


def deepmim_timm_vit_b_12() -> RunConfig:
    """DeepMIM ViT-B/16 on the token features of DINO's ViT-B/16; needs --teacher FILE."""
    return _deepmim_vit_b_12(target="timm:vit_base_patch16_224.dino", teacher_dim=768)


def deepmim_ema_vit_b_12() -> RunConfig:
    """DeepMIM ViT-B/16 on latents of a moving average of itself; one stage."""
    return _deepmim_vit_b_12(target="ema")


def _deepmim_vit_b(depth: int) -> RunConfig:
    model = ModelConfig(method="deepmim", depth=depth, taps=even_taps(depth, 4), **VIT_B)
    return RunConfig(model=model)


def deepmim_vit_b_24() -> RunConfig:
    """DeepMIM ViT-B with 24 blocks, four decoders spread evenly."""
    return _deepmim_vit_b(24)


def deepmim_vit_b_36() -> RunConfig:
    """DeepMIM ViT-B with 36 blocks, four decoders spread evenly."""
    return _deepmim_vit_b(36)


def deepmim_vit_b_48() -> RunConfig:
    """DeepMIM ViT-B with 48 blocks, four decoders spread evenly."""
    return _deepmim_vit_b(48)


def _deepmim_large(width: int, depth: int) -> RunConfig:
    """Heads of 64, and ViT-B's decoders, as the decoder does not grow with the encoder (MAE)."""
    sizes = VIT_B | {"embed_dim": width, "num_heads": width // 64}
    return RunConfig(
        model=ModelConfig(method="deepmim", depth=depth, taps=even_taps(depth, 4), **sizes)
    )


def deepmim_vit_1b() -> RunConfig:
    """DeepMIM with 40 blocks of width 1536 (1.2 B parameters), four decoders spread evenly."""
    return _deepmim_large(1536, 40)


def deepmim_vit_4b() -> RunConfig:
    """DeepMIM with 56 blocks of width 2432 (4.1 B parameters), four decoders spread evenly."""
    return _deepmim_large(2432, 56)


def mirl_vit_s_54() -> RunConfig:
    """MIRL ViT-S with 54 blocks: 6 segments, decoders of 1 block, width 384."""
    model = ModelConfig(
        method="mirl",
        depth=54,
        decoder_embed_dim=384,
        decoder_depth=1,
        decoder_num_heads=12,
        **VIT_S,
    )
    return RunConfig(model=model)


def mirl_vit_b_48() -> RunConfig:
    """MIRL ViT-B with 48 blocks: 6 segments, decoders of 2 blocks, width 512."""
    model = ModelConfig(method="mirl", depth=48, decoder_depth=2, **VIT_B)
    return RunConfig(model=model)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        quickstart,
        debug,
        debug_mae,
        debug_mirl,
        mae_vit_b_12,
        mae_vit_l_24,
        deepmim_vit_b_12,
        deepmim_clip_vit_b_12,
        deepmim_hog_vit_b_12,
        deepmim_timm_vit_b_12,
        deepmim_ema_vit_b_12,
        deepmim_vit_b_24,
        deepmim_vit_b_36,
        deepmim_vit_b_48,
        deepmim_vit_1b,
        deepmim_vit_4b,
        mirl_vit_s_54,
        mirl_vit_b_48,
    )
}


def load_preset(name: str) -> RunConfig:
    """The preset's config with its name filled in; UserError lists the names there are."""
    if name not in PRESETS:
        raise UserError(f"preset={name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]().replace(preset=name)
