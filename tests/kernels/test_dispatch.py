"""Choice of the backend, and the one-line errors of the public functions."""

import os
import subprocess
import sys
from types import SimpleNamespace
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

from deepmim_scale.config import RunConfig
from deepmim_scale.parallel import failure
from deepmim_scale.train import pretrain

CPU_ONLY = pytest.mark.skipif(_dispatch.INTERPRETED, reason="the interpreter runs on the CPU")
IMAGES = torch.zeros(2, 3, 8, 12)
PRED = torch.zeros(2, 6, 48)
MASK = torch.ones(2, 6)
IDS = torch.zeros(2, 6, dtype=torch.int64)


class FakeCuda:
    """Stands for a CUDA tensor of one dtype; `use_triton` looks at nothing else."""

    is_cuda = True
    device = "cuda:0"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "runs"),
    [
        ((9, 0), torch.bfloat16, True),
        ((8, 0), torch.float32, True),
        ((7, 5), torch.float16, True),
        ((7, 0), torch.float32, True),
        ((7, 0), torch.bfloat16, False),
        ((6, 1), torch.float32, False),
        ((9, 0), torch.float64, False),
    ],
)
def test_auto_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, runs: bool
) -> None:
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensor: Any = FakeCuda(dtype)
    assert _dispatch.use_triton("auto", tensor) == runs
    assert not _dispatch.use_triton("torch", tensor)
    if not runs:
        with pytest.raises(ValueError, match="backend='triton' cannot run"):
            _dispatch.use_triton("triton", tensor)


@CPU_ONLY
def test_cpu_uses_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")
    assert not _dispatch.use_triton("auto", IMAGES)
    with pytest.raises(ValueError, match="on cpu; use backend='auto' or 'torch'"):
        _dispatch.use_triton("triton", IMAGES)


def test_the_variable_sets_the_default_and_the_argument_wins() -> None:
    code = (
        "import torch\n"
        "from deepmim_kernels._dispatch import use_triton\n"
        "x = torch.zeros(1)\n"
        "print(use_triton('torch', x))\n"
        "use_triton('auto', x)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DEEPMIM_KERNELS": "fast"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "False"
    assert "backend='fast' is not a kernel backend" in result.stderr.splitlines()[-1]


def test_use_backend_holds_for_calls_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")  # put back at the end
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tensor: Any = FakeCuda(torch.float32)
    for name, runs in (("torch", False), ("auto", True), ("triton", True)):
        use_backend(name)
        assert _dispatch.use_triton("auto", tensor) == runs
        assert not _dispatch.use_triton("torch", tensor)
    with pytest.raises(ValueError, match="backend='fast' is not a kernel backend"):
        use_backend("fast")
    assert _dispatch.DEFAULT_BACKEND == "triton", "a mistake changed the backend"


@CPU_ONLY
def test_use_backend_says_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")
    use_backend("triton")
    with pytest.raises(ValueError, match="on cpu; use backend='auto' or 'torch'"):
        masked_mse(PRED, IMAGES, mask=MASK, patch_size=4)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_run_chooses_after_the_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(timeout: float) -> None:
        raise Stop

    config = RunConfig(kernels=name)
    monkeypatch.setattr(_dispatch, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(pretrain, "prepare", lambda config: SimpleNamespace(config=config))
    monkeypatch.setattr(pretrain, "describe", lambda prepared: [])
    monkeypatch.setattr(failure, "limit_waits", stop)
    with pytest.raises(Stop):
        pretrain.pretrain(config)
    chosen = _dispatch.DEFAULT_BACKEND
    assert chosen == name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": MASK, "ids": IDS}, "exactly one of mask and ids"),
        ({}, "exactly one of mask and ids"),
        ({"mask": MASK[:1]}, "mask is \\[B, L\\]"),
        ({"mask": MASK, "prefix_tokens": 1}, "L \\+ prefix_tokens"),
        ({"ids": IDS[:, :3]}, "pass ids \\[B, K\\]"),
        ({"ids": IDS, "prefix_tokens": 1}, "prefix_tokens 0"),
        ({"ids": IDS, "images": IMAGES[:, :, :4]}, "ids name 6 patches of 3"),
        ({"mask": MASK, "images": IMAGES[:, :, :4]}, "do not fit 3 patches"),
        ({"ids": IDS.int()}, "ids are torch.int32; pass torch.int64"),
        ({"ids": IDS, "images": IMAGES[:1]}, "images and pred have batches of 1 and 2"),
        ({"mask": MASK, "images": IMAGES.repeat(2, 1, 1, 1)}, "batches of 4 and 2"),
        ({"mask": MASK, "pred": PRED[0]}, "pred must be"),
        ({"mask": MASK, "pred": torch.zeros(2, 6, 47)}, "needs 48"),
        ({"mask": MASK, "images": IMAGES[0]}, "add the batch axis"),
        ({"mask": MASK, "patch_size": 5}, "cannot be cut into patches of 5"),
        ({"mask": MASK, "images": IMAGES.clone().requires_grad_()}, "images requires a gradient"),
        ({"mask": MASK, "images": IMAGES.byte()}, "pass uint8 with pixel_mean"),
        ({"mask": MASK, "images": IMAGES.int()}, "images are torch.int32"),
        ({"mask": MASK, "pixel_mean": [0.5] * 3}, "are for uint8 images"),
        (
            {"mask": MASK, "images": IMAGES.byte(), "pixel_mean": [0.5], "pixel_std": [0.5]},
            "images have 3 channels",
        ),
        ({"mask": MASK, "paired_pred": PRED[:, :3]}, "paired_pred is"),
        ({"mask": MASK, "paired_pred": PRED.half()}, "cast it to torch.float32"),
        ({"mask": MASK, "mix_target": PRED[:1]}, "mix_target is"),
        ({"mask": MASK, "mix_target": PRED.clone().requires_grad_()}, "detach it"),
        ({"mask": MASK, "mix_alpha": 0.5}, "pass mix_target"),
        ({"mask": MASK, "backend": "cuda"}, "backend='cuda' is not"),
        ({"mask": MASK, "mode": "fast"}, "mode='fast' is unknown"),
    ],
)
def test_masked_mse_errors(kwargs: dict[str, Any], message: str) -> None:
    arguments = {"pred": PRED, "images": IMAGES, "patch_size": 4, **kwargs}
    with pytest.raises(ValueError, match=message):
        masked_mse(**arguments)


def test_errors_of_the_other_functions() -> None:
    with pytest.raises(ValueError, match="batch and features must be equal"):
        masked_cosine(PRED, torch.zeros(2, 6, 40), mask=MASK)
    with pytest.raises(ValueError, match="teacher requires a gradient"):
        masked_cosine(PRED, PRED.clone().requires_grad_(), mask=MASK)
    with pytest.raises(ValueError, match="mask is"):
        masked_cosine(PRED, torch.zeros(2, 7, 48), mask=MASK)
    token, pos = torch.zeros(1, 1, 48), torch.zeros(1, 7, 48)
    with pytest.raises(ValueError, match="K <= L"):
        decoder_assemble(torch.zeros(2, 8, 48), token, pos, IDS)
    with pytest.raises(ValueError, match="pos_embed is \\(1, 6, 48\\)"):
        decoder_assemble(PRED, token, pos[:, 1:], IDS)
    with pytest.raises(ValueError, match="mask_token is \\(48,\\)"):
        decoder_assemble(PRED, token[0, 0], pos, IDS)
    with pytest.raises(ValueError, match="ids \\(1, 6\\) must be"):
        gather_patches(IMAGES, IDS[:1], patch_size=4)
    with pytest.raises(ValueError, match=r"ids are torch\.float32"):
        gather_patches(IMAGES, IDS.float(), patch_size=4)
    with pytest.raises(ValueError, match="ids name 6 patches of 5"):
        masked_cosine(PRED, torch.zeros(2, 5, 48), ids=IDS)
