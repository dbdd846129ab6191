"""Keyword names of earlier releases: the same result, a warning, and no trace in the signature."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepmim_kernels import masked_cosine, masked_mse
from deepmim_kernels._deprecated import accept_old_keywords
from torch import Tensor

IMAGES = torch.rand(2, 3, 8, 12)
IDS = torch.tensor([[0, 5], [3, 1]])
TEACHER = torch.rand(2, 6, 48)


def packed() -> Tensor:
    return torch.randn(2, 2, 48, generator=torch.Generator().manual_seed(0))


def mse(pred: Tensor, **kwargs: Any) -> Tensor:
    return masked_mse(pred, IMAGES, ids=IDS, patch_size=4, **kwargs)


def cosine(pred: Tensor, **kwargs: Any) -> Tensor:
    return masked_cosine(pred, TEACHER, ids=IDS, **kwargs)


@pytest.mark.parametrize(
    ("loss", "old", "new"),
    [
        (mse, {"hint": 0.5}, {"expected_grad_scale": 0.5}),
        (cosine, {"hint": 0.5}, {"expected_grad_scale": 0.5}),
        (mse, {"pred2": packed() + 1}, {"paired_pred": packed() + 1}),
        (
            mse,
            {"hybrid": (packed() + 1, 0.25)},
            {"mix_target": packed() + 1, "mix_alpha": 0.25},
        ),
    ],
    ids=["mse hint", "cosine hint", "pred2", "hybrid"],
)
def test_old_names_give_the_same_loss_and_a_warning(
    loss: Callable[..., Tensor], old: dict[str, Any], new: dict[str, Any]
) -> None:
    (name,) = old
    message = f"^{name}= is deprecated; use {'= and '.join(new)}=$"
    with pytest.warns(DeprecationWarning, match=message):
        actual = loss(packed(), **old)
    assert torch.equal(actual, loss(packed(), **new))


def test_new_names_and_defaults_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    mse(packed(), paired_pred=packed(), mix_target=packed(), mix_alpha=0.5)
    assert not recwarn.list
    # What callers passed who had nothing to pass.
    assert torch.equal(mse(packed(), pred2=None, hybrid=None, hint=1.0), mse(packed()))


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(DeprecationWarning, match="^hint=") as caught:
        masked_mse(packed(), IMAGES, ids=IDS, patch_size=4, hint=1.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("kwargs", "doubled"),
    [
        ({"hint": 1.0, "expected_grad_scale": 1.0}, "expected_grad_scale"),
        ({"hybrid": (packed(), 0.5), "mix_alpha": 0.5}, "mix_alpha"),
        ({"mix_alpha": 0.5, "hybrid": (packed(), 0.5)}, "mix_alpha"),
    ],
)
def test_old_and_new_together_are_an_error(kwargs: dict[str, Any], doubled: str) -> None:
    with pytest.raises(TypeError, match=f"is the old name of {doubled}; pass {doubled} only"):
        mse(packed(), **kwargs)


def test_unknown_keywords_stay_errors() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'hints'"):
        mse(packed(), hints=1.0)


@pytest.mark.parametrize("function", [masked_mse, masked_cosine])
def test_signature_and_help_show_the_new_names(function: Callable[..., Any]) -> None:
    names = inspect.signature(function).parameters
    assert "expected_grad_scale" in names
    assert not {"hint", "pred2", "hybrid"} & names.keys()
    assert "Raises `ValueError`" in (inspect.getdoc(function) or "")


def test_the_decorator_keeps_positional_arguments_and_results() -> None:
    @accept_old_keywords(old=("first", "second"))
    def together(x: int, first: int = 2, second: int = 3) -> tuple[int, int, int]:
        return x, first, second

    assert together(1) == (1, 2, 3)
    assert together(1, 4, second=5) == (1, 4, 5)
    assert together(1, old=(6, 7)) == (1, 6, 7)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["expected_grad_scale", "hint"])
def test_compiles_into_one_graph(name: str) -> None:
    def step(pred: Tensor) -> Tensor:
        return mse(pred, **{name: 0.5})

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(packed()), mse(packed()), rtol=1e-6, atol=0)
