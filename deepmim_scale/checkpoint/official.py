"""Weights under the names of the official MAE, DeepMIM and MIRL releases.

MAE's released weights are CC-BY-NC 4.0: models that start from them are for non-commercial use.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from deepmim_scale.methods import method_of
from deepmim_scale.models.model import Model

_WEIGHT_NORM = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def renamed(name: str, prefixes: Mapping[str, str]) -> str | None:
    """`name` with the first of our modules that it lies in renamed; None if it lies in none."""
    ours = next((p for p in prefixes if name == p or name.startswith(p + ".")), None)
    return None if ours is None else prefixes[ours] + name[len(ours) :]


def official_names(model: Model) -> dict[str, str]:
    """Parameter name of ours -> official name, for every entry of `model.state_dict()`."""
    prefixes = method_of(model.config).official_prefixes(model.config)
    names = {}
    for name in model.state_dict():
        official = renamed(name, prefixes) or name
        for theirs, ours in _WEIGHT_NORM.items():
            official = official.replace(ours, theirs)
        names[name] = official
    return names


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """Copy an official state dict (torch layout, released names) into a model of the same size.

    Returns our names of the decoder weights that the file does not have: encoder-only files have
    none of them. ValueError names the first missing, unknown or mis-shaped entry. Position tables
    are taken from the file.
    """
    assert isinstance(model, Model), "official weights belong to a whole model"
    if source != model.config.method:
        raise ValueError(f"source={source}: the model's method is {model.config.method}")
    names = official_names(model)
    unknown = sorted(set(state_dict) - set(names.values()))
    if unknown:
        raise ValueError(f"{unknown[0]}: not in the model; check depth, taps and decoder_depth")
    missing = [ours for ours, theirs in names.items() if theirs not in state_dict]
    decoder = [name for name in names if name.startswith(("decoders.", "carries."))]
    if missing and missing != decoder:
        raise ValueError(f"{names[missing[0]]}: missing from the state dict")
    target = model.state_dict()
    for ours, theirs in names.items():
        if ours in missing:
            continue
        value = state_dict[theirs]
        if value.numel() != target[ours].numel():
            shapes = f"{tuple(value.shape)} in the file, {tuple(target[ours].shape)} in the model"
            raise ValueError(f"{theirs}: shape {shapes}")
        target[ours].copy_(value.reshape(target[ours].shape))
    return missing
