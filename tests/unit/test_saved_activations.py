"""Local backward keeps far fewer activations than joint backward (ViT-B/12, 4 x 4 blocks)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "saved_activations.py"


@pytest.mark.parametrize("masked_query", [False, True])
def test_saved_activations(masked_query: bool) -> None:
    spec = importlib.util.spec_from_file_location("saved_activations", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = module.measure(2, masked_query)
    assert row["ratio"] >= 2.3, row
