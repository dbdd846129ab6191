"""Saving, loading and converting weights."""

from typing import Any

__all__ = ["load_official", "official_names"]


def __getattr__(name: str) -> Any:
    # On first use, so that the command line's --help does not import torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deepmim_scale.checkpoint import official

    return getattr(official, name)
