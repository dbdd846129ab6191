"""Byte model: what a piece of torch code moves through memory, counted operation by operation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ByteCounter(TorchDispatchMode):
    """Adds up what every operation reads and writes; views are free, broadcasts count once.

    Works on meta tensors, so no memory and no GPU are needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.name()
        # Allocation and views touch no elements; a fill writes but reads nothing.
        if not (function.is_view or "empty" in name or "_unsafe_view" in name):
            moved = (out,) if "zero" in name else (args, kwargs, out)
            self.bytes += sum(extent(x) for x in tree_leaves(moved) if isinstance(x, Tensor))
        return out


def extent(x: Tensor) -> int:
    """Bytes of the elements that a tensor addresses, without those repeated by stride 0."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        # An expanded tensor is read from cache after its first pass.
        count *= length if stride else 1
    return count * x.element_size()


def count_bytes(call: Callable[[], object]) -> int:
    """Bytes that `call` reads and writes, one operation at a time as eager torch does."""
    with ByteCounter() as counter:
        call()
    return counter.bytes
