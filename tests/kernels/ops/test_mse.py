"""masked_mse on Triton against the float64 reference."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from deepmim_kernels import masked_mse, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.1), (0.229, 0.224, 0.225, 0.2, 0.05)
FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "patch": [7, 8, 14, 16, 32],
    "channels": [1, 3, 4, 5],
    "selection": ["all", "none", "random", "bernoulli", "packed", "packed one"],
    "mode": ["onepass", "onepass hinted", "recompute"],
    "upstream": [1.0, 0.25, 65536.0],
    "images": ["fp32", "fp16", "uint8", "uint8 channels last", "uint16", "fp32 sliced"],
    "shape": [(1, 2, 2), (2, 2, 3), (3, 1, 2)],
    "target": ["plain", "pair", "hybrid", "pixels"],
}


class Case(NamedTuple):
    dtype: torch.dtype
    patch: int
    channels: int
    selection: str
    mode: str
    upstream: float
    images: str
    shape: tuple[int, int, int]
    target: str

    def in_fp16_range(self) -> bool:
        """False where fp16 cannot hold the gradient: it would be subnormal, whoever computes it."""
        scale = self.upstream if self.mode != "onepass" else 1.0
        return self.dtype != torch.float16 or scale > 0.25 * self.patch**2 * self.channels / 49


def cases() -> Iterator[Case]:
    everything = [Case(*values) for values in itertools.product(*FACTORS.values())]
    random.Random(0).shuffle(everything)
    return (case for case in everything if case.in_fp16_range())


def covering() -> list[Case]:
    """Few cases in which every two values of any two factors meet."""
    met: set[Any] = set()
    chosen = []
    for least_new in (30, 20, 10, 5, 1):
        for case in cases():
            pairs = set(itertools.combinations(enumerate(case), 2)) - met
            if len(pairs) >= least_new:
                met |= pairs
                chosen.append(case)
    return chosen


def make_images(case: Case, batch: int, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
    shape = (batch, case.channels, height, width)
    if case.images.startswith("uint"):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        if case.images == "uint16":
            images = (257 * images.int() - torch.randint(0, 257, shape)).clamp(0).to(torch.uint16)
        if case.images.endswith("channels last"):
            images = images.to(memory_format=torch.channels_last)
        scale = {"pixel_mean": MEAN[: case.channels], "pixel_std": STD[: case.channels]}
        return images, scale
    if case.images == "fp32 sliced":
        return torch.randn(batch, case.channels, height + 3, 2 * width)[:, :, 3:, ::2], {}
    return torch.randn(shape).to(torch.float16 if case.images == "fp16" else torch.float32), {}


def make_selection(kind: str, batch: int, patches: int) -> dict[str, Tensor]:
    if kind.startswith("packed"):
        count = 1 if kind == "packed one" else max(patches * 3 // 4, 1)
        return {"ids": torch.rand(batch, patches).argsort(dim=1)[:, :count]}
    mask = {
        "all": torch.ones(batch, patches),
        "none": torch.zeros(batch, patches),
        "random": (torch.rand(batch, patches).argsort(dim=1) >= patches // 4).float(),
        "bernoulli": (torch.rand(batch, patches) < 0.5).float(),
    }
    return {"mask": mask[kind]}


def check(case: Case, device: torch.device, assert_close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    batch, rows, columns = case.shape
    images, scale = make_images(case, batch, rows * case.patch, columns * case.patch)
    selection = make_selection(case.selection, batch, rows * columns)
    prefix = 1 if "mask" in selection else 0
    tokens = prefix + (rows * columns if "mask" in selection else selection["ids"].shape[1])
    shape = (batch, tokens, case.patch**2 * case.channels)
    pred, other = torch.randn(shape).to(case.dtype), torch.randn(shape).to(case.dtype)
    pair, hybrid = case.target == "pair", case.target == "hybrid"

    def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(device, dtype).requires_grad_()

    expected = leaf(pred, torch.float64), leaf(other, torch.float64)
    expected_loss, expected_rows = reference.masked_mse(
        expected[0],
        expected[1] if pair else None,
        expected[1].detach() if hybrid else None,
        images.to(device),
        selection["mask"].to(device) if prefix else None,
        None if prefix else selection["ids"].to(device),
        patch_size=case.patch,
        prefix_tokens=prefix,
        norm_pix=case.target != "pixels",
        mix_alpha=1 / 3 if hybrid else 1.0,
        mean=scale.get("pixel_mean", ()),
        std=scale.get("pixel_std", ()),
    )
    (expected_loss * case.upstream).backward()

    actual = leaf(pred, case.dtype), leaf(other, case.dtype)
    loss, rows_loss = masked_mse(
        actual[0],
        images.to(device),
        **{name: x.to(device) for name, x in selection.items()},
        **scale,
        patch_size=case.patch,
        prefix_tokens=prefix,
        norm_pix=case.target != "pixels",
        paired_pred=actual[1] if pair else None,
        mix_target=actual[1].detach() if hybrid else None,
        mix_alpha=1 / 3 if hybrid else 1.0,
        mode=case.mode.split()[0],
        expected_grad_scale=case.upstream if case.mode.endswith("hinted") else 1.0,
        backend="triton",
        return_rows=True,
    )
    (loss * case.upstream).backward()
    assert_close("loss", loss, expected_loss, torch.float32)
    assert_close("rows", rows_loss, expected_rows, torch.float32)
    assert_close("gradient", actual[0].grad, expected[0].grad, case.dtype)
    if pair:
        assert torch.equal(actual[0].grad, actual[1].grad)
    assert torch.equal(actual[0].detach().cpu(), pred), "the prediction was written to"


@pytest.mark.parametrize("case", covering(), ids=str)
def test_float64(case: Case, device: torch.device, assert_close: Callable[..., None]) -> None:
    check(case, device, assert_close)


@pytest.mark.soak
def test_float64_product(device: torch.device, assert_close: Callable[..., None]) -> None:
    """Every combination of the first six factors, the others drawn at random."""
    rng = random.Random(0)
    *drawn, first, second, third = FACTORS.values()
    for values in itertools.product(*drawn):
        case = Case(*values, *(rng.choice(options) for options in (first, second, third)))
        if case.in_fp16_range():
            try:
                check(case, device, assert_close)
            except AssertionError as error:
                raise AssertionError(str(case)) from error


class Problem(NamedTuple):
    """A small problem: 32 x 48 images, patch 16, 3 channels, 6 patches."""

    pred: Tensor
    images: Tensor
    mask: Tensor


@pytest.fixture
def problem(device: torch.device) -> Problem:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 48)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    return Problem(torch.randn(2, 6, 768).to(device), images.to(device), mask.float().to(device))


def triton_loss(pred: Tensor, images: Tensor, **kwargs: Any) -> Tensor:
    return masked_mse(pred, images, patch_size=16, backend="triton", **kwargs)


def gradient(pred: Tensor, images: Tensor, upstream: float = 1.0, **kwargs: Any) -> Tensor:
    leaf = pred.clone().requires_grad_()
    (triton_loss(leaf, images, **kwargs) * upstream).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_packed_equals_dense(problem: Problem) -> None:
    pred, images, mask = problem
    ids = mask.nonzero()[:, 1].view(2, 4)
    index = ids.unsqueeze(-1).expand(-1, -1, 768)
    dense = gradient(pred, images, mask=mask)
    packed = gradient(pred.gather(1, index), images, ids=ids)
    assert torch.equal(dense.gather(1, index), packed)
    assert torch.equal(dense[mask == 0], torch.zeros_like(dense[mask == 0]))


def test_same_bits_every_run(problem: Problem) -> None:
    pred, images, mask = problem
    for mode in ("onepass", "recompute"):
        runs = [gradient(pred, images, 3.0, mask=mask, mode=mode) for _ in range(2)]
        losses = [triton_loss(pred, images, mask=mask) for _ in range(2)]
        assert torch.equal(*runs)
        assert torch.equal(*losses)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_mask_dtypes_and_strides(problem: Problem, dtype: torch.dtype) -> None:
    pred, images, mask = problem
    expected = gradient(pred, images, mask=mask[:1].expand(2, -1).contiguous())
    assert torch.equal(gradient(pred, images, mask=mask[:1].to(dtype).expand(2, -1)), expected)


def test_fractional_weights(problem: Problem, assert_close: Callable[..., None]) -> None:
    pred, images, mask = problem
    weights = mask * 0.05
    leaf = pred.double().requires_grad_()
    reference_loss = masked_mse(leaf, images, mask=weights, patch_size=16, backend="torch")
    reference_loss.backward()
    assert_close("gradient", gradient(pred, images, mask=weights), leaf.grad, torch.float32)


def test_sliced_prediction(problem: Problem) -> None:
    pred, images, mask = problem
    wide = torch.randn(2, 7, 1536, device=pred.device)
    wide[:, 1:, ::2] = pred
    leaf = wide.requires_grad_()
    triton_loss(leaf[:, 1:, ::2], images, mask=mask).backward()
    expected = torch.zeros_like(wide)
    expected[:, 1:, ::2] = gradient(pred, images, mask=mask)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("mode", ["onepass", "recompute"])
def test_prediction_used_twice(
    problem: Problem, mode: str, assert_close: Callable[..., None]
) -> None:
    pred, images, mask = problem

    def total(backend: str, dtype: torch.dtype) -> Tensor:
        leaf = pred.detach().to(dtype, copy=True).requires_grad_()
        loss = masked_mse(leaf, images, mask=mask, patch_size=16, backend=backend, mode=mode)
        (2 * loss + leaf.sin().sum() + (leaf * loss.detach()).sum()).backward()
        return leaf.grad

    assert_close(
        "gradient", total("triton", torch.float32), total("torch", torch.float64), torch.float32
    )


def test_second_backward(problem: Problem) -> None:
    pred, images, mask = problem
    leaf = pred.clone().requires_grad_()
    loss = triton_loss(leaf, images, mask=mask, mode="recompute")
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    loss = triton_loss(leaf, images, mask=mask, mode="onepass")
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, first)
    with pytest.raises(RuntimeError, match="mode='recompute'"):
        loss.backward()


def test_gradcheck(problem: Problem) -> None:
    # The loss is quadratic, so a wide step costs no truncation error and hides fp32 rounding.
    pred = problem.pred[:1, :2, :].requires_grad_()
    images = problem.images[:1, :, :16, :32]
    ids = torch.tensor([[1, 0]], device=pred.device)
    assert torch.autograd.gradcheck(
        lambda p: triton_loss(p, images, ids=ids, mode="recompute") * 1000,
        pred,
        eps=0.5,
        atol=1e-2,
        rtol=1e-3,
        fast_mode=True,
    )


def test_without_gradient(problem: Problem) -> None:
    pred, images, mask = problem
    leaf = pred.clone().requires_grad_()
    with torch.no_grad():
        loss = triton_loss(leaf, images, mask=mask)
    assert not loss.requires_grad
    assert torch.equal(loss, triton_loss(leaf, images, mask=mask).detach())


def test_nothing_masked_is_zero(problem: Problem) -> None:
    pred, images, mask = problem
    leaf = pred.clone().requires_grad_()
    loss = triton_loss(leaf, images, mask=torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0.0
    assert not leaf.grad.any()


def test_flat_patches_stay_finite(problem: Problem) -> None:
    pred, _, mask = problem
    flat = torch.full((2, 3, 32, 48), 100.0, device=pred.device)
    expected = masked_mse(pred.double(), flat.double(), mask=mask, patch_size=16, backend="torch")
    # Only eps is left under the root: it magnifies the rounding of the mean a thousandfold.
    torch.testing.assert_close(
        triton_loss(pred, flat, mask=mask).double(), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("mode", "expected", "low", "high"),
    [
        ("auto", 1.0, 0.0, 1e-3),
        ("onepass", 65536 / 128, 0.0, 1e-3),
        # What `auto` avoids: gradients stored at scale 1 underflow in fp16.
        ("onepass", 1 / 128, 0.05, 0.2),
    ],
)
def test_fp16_at_batch_128(
    device: torch.device, mode: str, expected: float, low: float, high: float
) -> None:
    # One image stands for 128: an upstream gradient of 1/128 makes the scale 2 / (768 * 128 * 147).
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224, device=device)
    pred = torch.randn(1, 147, 768, device=device).half()
    ids = torch.rand(1, 196, device=device).argsort(dim=1)[:, :147]
    actual = gradient(pred, images, 65536 / 128, ids=ids, mode=mode, expected_grad_scale=expected)
    leaf = pred.double().requires_grad_()
    loss = masked_mse(leaf, images, ids=ids, patch_size=16, backend="torch")
    (loss * 65536 / 128).backward()
    error = ((actual.double() - leaf.grad).norm() / leaf.grad.norm()).item()
    print(f"fp16 at batch 128, {mode}, expected scale {expected:g}: gradient error {error:.2e}")
    assert low <= error <= high


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch=st.integers(2, 9),
    channels=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_any_shape(
    device: torch.device,
    assert_close: Callable[..., None],
    batch: int,
    grid: tuple[int, int],
    patch: int,
    channels: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    images = torch.randn(batch, channels, grid[0] * patch, grid[1] * patch, device=device)
    patches = grid[0] * grid[1]
    ids = torch.rand(batch, patches, device=device).argsort(dim=1)[:, : patches // 2 + 1]
    pred = torch.randn(*ids.shape, patch**2 * channels, device=device)
    losses, gradients = [], []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaf = pred.detach().to(dtype, copy=True).requires_grad_()
        loss = masked_mse(leaf, images, ids=ids, patch_size=patch, backend=backend)
        loss.backward()
        losses.append(loss)
        gradients.append(leaf.grad)
    assert_close("loss", *losses, torch.float32)
    assert_close("gradient", *gradients, torch.float32)
