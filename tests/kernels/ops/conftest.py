"""Fixtures of the Triton tests: device, poisoned outputs, and the comparison with float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# Largest relative norm error of a gradient. Triton's interpreter truncates fp32 to bf16, where a
# GPU rounds to nearest.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3 if torch.cuda.is_available() else 8e-3,
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that an element no kernel writes is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "torch.empty is not poisoned"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def assert_close() -> Callable[[str, Tensor, Tensor, torch.dtype], None]:
    """Relative norm error against float64, within the bound of the storage dtype."""

    def check(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        assert expected.dtype == torch.float64, "the judge is float64"
        assert actual.isfinite().all(), f"{name}: not finite"
        error = (actual.double() - expected).norm().item()
        size = expected.norm().item()
        bound = TOLERANCE[dtype]
        assert error <= bound * size, f"{name}: {error / size if size else error:.2e} > {bound}"

    return check
