"""Old names of keyword arguments: still accepted, each with a warning that gives the new name."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def accept_old_keywords(**new_names: tuple[str, ...]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function be called with old keywords: old name -> the names that replace it.

    The value of an old keyword with several new names is a tuple, one part for each; None leaves
    them at their defaults. The signature seen by `inspect` and `help` has the new names only.

    An old keyword warns with `DeprecationWarning`, but not inside a graph of torch.compile.
    Raises `TypeError` where an old keyword and its new one are given together.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            renamed: dict[str, Any] = dict(kwargs)
            # Membership and plain loops: torch.compile traces this into every graph.
            for old in [name for name in kwargs if name in new_names]:
                new, value = new_names[old], renamed.pop(old)
                message = f"{old}= is deprecated; use {'= and '.join(new)}="
                if not torch.compiler.is_compiling():  # a warning would break the graph
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                for name, part in _parts(new, value):
                    if name in renamed:
                        raise TypeError(f"{old} is the old name of {name}; pass {name} only")
                    renamed[name] = part
            return function(*args, **renamed)

        return call

    return decorate


def _parts(new: tuple[str, ...], value: Any) -> list[tuple[str, Any]]:
    if len(new) == 1:
        return [(new[0], value)]
    return [] if value is None else list(zip(new, value, strict=True))
