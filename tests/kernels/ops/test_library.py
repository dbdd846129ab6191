"""The custom ops inside torch: opcheck, torch.compile without a graph break, autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepmim_kernels import (
    _dispatch,
    decoder_assemble,
    gather_patches,
    masked_cosine,
    masked_mse,
    use_backend,
)
from torch import Tensor
from torch.library import opcheck

ops = torch.ops.deepmim


@pytest.fixture(autouse=True)
def poisoned_outputs() -> None:
    """Unpoisoned: opcheck compares the contents of empty tensors, which are undefined."""


@pytest.mark.parametrize("onepass", [False, True])
def test_opcheck_losses(device: torch.device, onepass: bool) -> None:
    images = torch.randn(1, 3, 8, 16, device=device)
    pred = torch.randn(1, 3, 192, device=device, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0]], device=device)
    count = torch.tensor(1.0, device=device)
    config = (8, 1, True, 1.0, [], [])
    opcheck(
        ops.masked_mse.default,
        (pred, None, None, images, mask, None, None, count, onepass, *config),
    )
    ids = torch.tensor([[0, 2, 1]], device=device)
    teacher = torch.randn(1, 3, 192, device=device)
    opcheck(ops.masked_cosine.default, (pred, teacher, None, ids, None, None, onepass, 0, 0))


def test_opcheck_the_other_ops(device: torch.device) -> None:
    pred = torch.randn(1, 2, 12, device=device)
    upstream = torch.ones((), device=device)
    ids = torch.tensor([[0, 1]], device=device)
    images = torch.randn(1, 3, 2, 4, device=device)
    opcheck(
        ops.masked_mse_gradient.default,
        (pred, None, None, images, None, ids, upstream, None, 2, 0, True, 1.0, [], []),
    )
    opcheck(
        ops.masked_cosine_gradient.default,
        (pred, pred.clone(), None, ids, upstream, None, 0, 0),
    )
    opcheck(ops.rescale_.default, (pred.clone(), upstream * 2, None))
    tokens = torch.randn(1, 2, 8, device=device, requires_grad=True)
    mask_token = torch.randn(1, 1, 8, device=device, requires_grad=True)
    pos = torch.randn(1, 4, 8, device=device)
    restore = torch.tensor([[1, 2, 0]], device=device)
    opcheck(ops.decoder_assemble.default, (tokens, mask_token, pos, restore))
    opcheck(ops.decoder_assemble_gradient.default, (pos, restore, 1, torch.float32))
    opcheck(ops.gather_patches.default, (images, ids, 2, [], []))


def step(pred: Tensor, tokens: Tensor, images: Tensor, ids: Tensor) -> Tensor:
    """Every public function once, in one graph."""
    visible = gather_patches(images, ids, patch_size=8, backend="triton")
    mask_token, pos = tokens[:1, :1], tokens[:1, :1].expand(1, 3, -1)
    decoded = decoder_assemble(tokens, mask_token, pos, ids, backend="triton")
    loss = masked_mse(pred + visible, images, ids=ids, patch_size=8, backend="triton")
    cosine = masked_cosine(
        decoded,
        decoded.detach() + 1,
        mask=ids > 0,
        backend="triton",
        prefix_tokens=1,
        teacher_prefix_tokens=1,
    )
    return 3 * loss + cosine


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 16, device=device)
    ids = torch.tensor([[0, 1], [1, 0]], device=device)
    start = torch.randn(2, 2, 192, device=device), torch.randn(2, 2, 16, device=device)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in start]
        loss = function(*leaves, images, ids)
        loss.backward()
        return [loss, *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(run(step), run(compiled), strict=True):
        assert torch.equal(eager, graph)


def test_a_compiled_graph_follows_use_backend(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")  # put back at the end
    images = torch.randn(1, 3, 8, 8, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    fused: list[bool] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        fused.append("deepmim.gather_patches" in graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: gather_patches(x, ids, patch_size=8), fullgraph=True, backend=count
    )
    results = []
    for name in ("torch", "triton", "triton"):
        use_backend(name)
        results.append(compiled(images))
    assert fused == [False, True]
    assert all(torch.equal(x, results[0]) for x in results)


def test_autocast_leaves_the_loss_in_fp32(device: torch.device) -> None:
    images = torch.randn(1, 3, 8, 8, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    pred = torch.randn(1, 1, 192, device=device).bfloat16().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = masked_mse(pred, images, ids=ids, patch_size=8, backend="triton")
    loss.backward()
    assert loss.dtype == torch.float32
    assert pred.grad.dtype == torch.bfloat16
