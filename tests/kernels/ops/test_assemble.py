"""decoder_assemble on Triton: the bits of the reference in fp32, float64 for its gradients."""

from collections.abc import Callable

import pytest
import torch
from deepmim_kernels import decoder_assemble
from torch import Tensor


def make_inputs(
    device: torch.device, batch: int, patches: int, visible: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randn(batch, visible + 1, dim, device=device)
    mask_token, pos = torch.randn(1, 1, dim, device=device), torch.randn(1, patches + 1, dim)
    restore = torch.rand(batch, patches).argsort(dim=1)
    return tokens, mask_token, pos.to(device), restore.to(device)


@pytest.mark.parametrize(
    ("batch", "patches", "visible", "dim"),
    [(1, 1, 1, 1), (3, 16, 4, 64), (2, 49, 12, 384), (2, 15, 15, 100), (2, 33, 1, 512)],
)
def test_bit_equal_in_fp32(
    device: torch.device,
    assert_close: Callable[..., None],
    batch: int,
    patches: int,
    visible: int,
    dim: int,
) -> None:
    inputs = make_inputs(device, batch, patches, visible, dim)
    upstream = torch.randn(batch, patches + 1, dim, device=device)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs[:3]]
        out = decoder_assemble(*leaves, inputs[3], backend=backend)
        out.backward(upstream.to(dtype))
        return [out, *(x.grad for x in leaves)]

    actual = run("triton", torch.float32)
    plain = run("torch", torch.float32)
    exact = run("torch", torch.float64)
    assert torch.equal(actual[0], plain[0])
    assert torch.equal(actual[1], plain[1])
    for name, a, e in zip(("mask token", "positions"), actual[2:], exact[2:], strict=True):
        assert_close(name, a, e, torch.float32)
    for first, second in zip(actual, run("triton", torch.float32), strict=True):
        assert torch.equal(first, second), "a second run gave other bits"


@pytest.mark.parametrize(
    ("token_dtype", "mask_dtype", "out_dtype"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_promote_as_cat_does(
    device: torch.device,
    assert_close: Callable[..., None],
    token_dtype: torch.dtype,
    mask_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    tokens, mask_token, pos, restore = make_inputs(device, 2, 16, 4, 64)
    inputs = [tokens.to(token_dtype), mask_token.to(mask_dtype), pos.to(mask_dtype)]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = decoder_assemble(*leaves, restore, backend="triton")
    plain = decoder_assemble(*inputs, restore, backend="torch")
    assert out.dtype == plain.dtype == out_dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = decoder_assemble(*exact, restore, backend="torch")
    assert_close("output", out, expected, out_dtype)
    upstream = torch.randn(out.shape, device=device).to(out_dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert_close("tokens", leaves[0].grad, exact[0].grad, token_dtype)
    assert_close("mask token", leaves[1].grad, exact[1].grad, mask_dtype)
    assert leaves[0].grad.dtype == token_dtype
    assert leaves[1].grad.dtype == mask_dtype


def test_strided_inputs_and_expanded_gradient(device: torch.device) -> None:
    tokens, mask_token, pos, restore = make_inputs(device, 2, 16, 4, 64)
    wide = torch.zeros(2, 5, 128, device=device)
    wide[:, :, ::2] = tokens
    results = []
    for backend in ("triton", "torch"):
        leaf = wide.clone().requires_grad_()
        strided_restore = restore.repeat_interleave(2, dim=1)[:, ::2]
        out = decoder_assemble(leaf[:, :, ::2], mask_token, pos, strided_restore, backend=backend)
        # `sum` hands back an expanded gradient with stride 0.
        out.sum().backward()
        results.append((out, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_gradcheck(device: torch.device) -> None:
    tokens, mask_token, pos, restore = make_inputs(device, 1, 4, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *leaves: decoder_assemble(*leaves, restore, backend="triton"),
        [x.requires_grad_() for x in (tokens, mask_token, pos)],
        eps=0.5,
        atol=1e-4,
        rtol=1e-4,
    )
