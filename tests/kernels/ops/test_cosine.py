"""masked_cosine on Triton against the float64 reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepmim_kernels import masked_cosine
from torch import Tensor


def make_selection(kind: str, batch: int, patches: int) -> dict[str, Tensor]:
    if kind.startswith("packed"):
        count = 1 if kind == "packed one" else patches * 3 // 4
        return {"ids": torch.rand(batch, patches).argsort(dim=1)[:, :count]}
    rate = {"all": 1.0, "none": 0.0, "bernoulli": 0.6}[kind]
    return {"mask": (torch.rand(batch, patches) < rate).float()}


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype", "dim", "selection", "mode", "upstream", "prefixes"),
    [
        (torch.float32, torch.float32, 512, "bernoulli", "onepass", 1.0, (1, 1)),
        (torch.float32, torch.float32, 512, "packed", "recompute", 0.25, (0, 1)),
        (torch.float32, torch.bfloat16, 100, "all", "recompute", 65536.0, (0, 0)),
        (torch.float32, torch.float16, 1, "packed one", "onepass", 1.0, (0, 0)),
        (torch.float32, torch.float32, 37, "none", "onepass", 1.0, (1, 0)),
        (torch.float16, torch.float32, 512, "bernoulli", "recompute", 65536.0, (0, 1)),
        (torch.float16, torch.float16, 768, "packed", "auto", 65536.0, (0, 0)),
        (torch.bfloat16, torch.bfloat16, 512, "bernoulli", "onepass", 0.25, (1, 1)),
        (torch.bfloat16, torch.float32, 100, "packed", "recompute", 1.0, (0, 1)),
        (torch.bfloat16, torch.bfloat16, 512, "all", "auto", 65536.0, (1, 0)),
    ],
)
def test_float64(
    device: torch.device,
    assert_close: Callable[..., None],
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    dim: int,
    selection: str,
    mode: str,
    upstream: float,
    prefixes: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    chosen = {k: x.to(device) for k, x in make_selection(selection, 2, 8).items()}
    prefix, teacher_prefix = prefixes
    tokens = chosen["ids"].shape[1] if "ids" in chosen else prefix + 8
    pred = torch.randn(2, tokens, dim, device=device).to(dtype)
    teacher = torch.randn(2, teacher_prefix + 8, dim, device=device).to(teacher_dtype)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = pred.detach().to(dtype, copy=True).requires_grad_()
        loss, rows = masked_cosine(
            leaf,
            teacher.double() if backend == "torch" else teacher,
            **chosen,
            prefix_tokens=prefix,
            teacher_prefix_tokens=teacher_prefix,
            mode=mode,
            backend=backend,
            return_rows=True,
        )
        (loss * upstream).backward()
        return loss, rows, leaf.grad

    actual, expected = run("triton", dtype), run("torch", torch.float64)
    assert_close("loss", actual[0], expected[0], torch.float32)
    assert_close("rows", actual[1], expected[1], torch.float32)
    # In one dimension the cosine is constant: its gradient is rounding, not zero.
    if dim > 1:
        assert_close("gradient", actual[2], expected[2], dtype)


def triton_loss(pred: Tensor, teacher: Tensor, **kwargs: Any) -> Tensor:
    return masked_cosine(pred, teacher, backend="triton", **kwargs)


def test_packed_equals_dense_bit_for_bit_every_run(device: torch.device) -> None:
    torch.manual_seed(0)
    pred, teacher = torch.randn(2, 2, 6, 64, device=device)
    ids = torch.tensor([[1, 2, 5], [0, 3, 4]], device=device)
    mask = torch.zeros(2, 6, device=device).scatter(1, ids, 1.0)
    index = ids.unsqueeze(-1).expand(-1, -1, 64)
    grads = []
    for _ in range(2):
        dense = pred.clone().requires_grad_()
        triton_loss(dense, teacher, mask=mask).backward()
        packed = pred.gather(1, index).requires_grad_()
        triton_loss(packed, teacher, ids=ids).backward()
        grads += [dense.grad.gather(1, index), packed.grad]
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_used_twice_and_differentiated_twice(
    device: torch.device, assert_close: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    pred, teacher = torch.randn(2, 2, 6, 64, device=device)
    mask = torch.ones(2, 6, device=device)
    leaf = pred.clone().requires_grad_()
    loss = triton_loss(leaf, teacher, mask=mask, mode="onepass")
    (loss * 2 + leaf.sin().sum()).backward(retain_graph=True)
    exact = pred.double().requires_grad_()
    (masked_cosine(exact, teacher, mask=mask, backend="torch") * 2 + exact.sin().sum()).backward()
    assert_close("gradient", leaf.grad, exact.grad, torch.float32)
    with pytest.raises(RuntimeError, match="mode='recompute'"):
        loss.backward()


def test_gradcheck(device: torch.device) -> None:
    torch.manual_seed(0)
    pred = torch.randn(1, 2, 8, device=device, requires_grad=True)
    teacher = torch.randn(1, 3, 8, device=device)
    ids = torch.tensor([[2, 0]], device=device)
    assert torch.autograd.gradcheck(
        lambda p: triton_loss(p, teacher, ids=ids, mode="recompute"),
        pred,
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )
