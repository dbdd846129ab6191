"""What the kernel tests share: where the Triton tests run, and the soak guard.

Triton decides between its compiler and its interpreter when a kernel is decorated, so a process
has one or the other. On a machine with a GPU the tests in `ops/` are ordinary tests. Elsewhere they
are collected only under TRITON_INTERPRET=1, in the process that `test_interpreted.py` starts: no
other test then depends on who imports Triton first.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["ops"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip soak tests unless `-m` names them."""
    if "soak" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="soak: run with -m soak"))
