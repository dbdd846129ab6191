"""Whose fault an error is: what gloo says of a lost or silent peer comes without a type."""

from __future__ import annotations

import pytest

from deepmim_scale.parallel.failure import is_of_peers


@pytest.mark.parametrize(
    ("error", "of_peers"),
    [
        (RuntimeError("[/x/gloo/pair.cc:545] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("planted"), False),
    ],
    ids=str,
)
def test_whose_fault(error: Exception, of_peers: bool) -> None:
    assert is_of_peers(error) == of_peers
