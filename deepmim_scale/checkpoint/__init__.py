"""Saving, loading and converting weights."""

from deepmim_scale.checkpoint.files import newest, resolve, verify
from deepmim_scale.checkpoint.official import load_official, official_names

__all__ = ["load_official", "newest", "official_names", "resolve", "verify"]
