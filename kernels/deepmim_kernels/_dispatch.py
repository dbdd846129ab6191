"""Which implementation runs: the Triton kernels or the plain torch reference."""

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
BACKENDS = get_args(Backend)

TRITON_AVAILABLE = importlib.util.find_spec("triton") is not None
# Triton fixes this when a kernel is decorated, so it is read once, when the package is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What backend="auto" means. A module constant, for a compiled graph cannot read the environment:
# torch.compile guards on its value, and traces again when `use_backend` changes it.
DEFAULT_BACKEND = os.environ.get("DEEPMIM_KERNELS", "auto")

DTYPES = (torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32)


def use_backend(name: Backend) -> None:
    """Set what backend="auto" means from now on, instead of the variable `DEEPMIM_KERNELS`.

    `auto` is Triton on a GPU that supports the kernel and the reference elsewhere; `triton` and
    `torch` are that implementation always. Raises `ValueError` for another name.
    """
    global DEFAULT_BACKEND
    _check_name(name)
    DEFAULT_BACKEND = name


def use_triton(backend: str, *tensors: Tensor) -> bool:
    """Whether these tensors (the floating inputs of one call) go to the Triton kernel.

    `auto` means what `use_backend` set last, else the value of `DEEPMIM_KERNELS` at import, and
    where that is unset Triton on a GPU that supports the kernel and the reference elsewhere.
    Raises `ValueError` for an unknown backend, or for `triton` where it cannot run.
    """
    choice = DEFAULT_BACKEND if backend == "auto" else backend
    _check_name(choice)
    if choice == "torch":
        return False
    # `auto` falls back in silence; who asks for Triton by name is told why not.
    obstacle = _obstacle(tensors)
    if choice == "triton" and obstacle is not None:
        raise ValueError(f"backend='triton' cannot run: {obstacle}; use backend='auto' or 'torch'")
    return obstacle is None and (choice == "triton" or tensors[0].is_cuda)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(
            f"backend={name!r} is not a kernel backend; use 'auto', 'triton' or 'torch' "
            "(argument `backend`, use_backend or variable DEEPMIM_KERNELS)"
        )


def _obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    if not TRITON_AVAILABLE:
        return "triton is not installed"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"no kernel takes {tensor.dtype}"
    # Off the GPU only the interpreter runs kernels, if it was asked for at import.
    if not tensors[0].is_cuda:
        return None if INTERPRETED else f"the tensors are on {tensors[0].device}"
    capability = _capability(tensors[0].device)
    if capability < (7, 0):
        return f"compute capability {capability} is below 7.0"
    # Volta and Turing have no bf16 instructions; emulation is slower than the reference.
    if capability < (8, 0) and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return f"compute capability {capability} has no bfloat16"
    return None


# A tuple of numbers is no node of a compiled graph: it is looked up when the graph is traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
