"""In which floating-point types a run computes, and what each of its tensors is. No torch."""

from __future__ import annotations

from enum import StrEnum

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Precision(StrEnum):
    """Compute precision of a run.

    The plain 16-bit kinds are autocast over fp32 weights, as in the papers. The pure kinds hold
    the weights in 16 bits too, with fp32 masters in the optimizer: least memory, rounded gradients.
    """

    FP32 = "fp32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    PURE_BFLOAT16 = "pure_bfloat16"
    PURE_FLOAT16 = "pure_float16"

    @property
    def is_pure(self) -> bool:
        """Whether the weights themselves are 16-bit numbers."""
        return self.value.startswith("pure_")

    @property
    def is_autocast(self) -> bool:
        """Whether fp32 weights meet 16-bit matrix products."""
        return self in (Precision.BFLOAT16, Precision.FLOAT16)

    @property
    def product(self) -> str:
        """Type of what a matrix product makes, as torch names it."""
        return "float32" if self is Precision.FP32 else self.value.removeprefix("pure_")

    @property
    def residual(self) -> str:
        """Type of the residual stream, which autocast leaves in fp32."""
        return self.product if self.is_pure else "float32"
