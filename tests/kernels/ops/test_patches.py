"""gather_patches on Triton against the reference and against the patch convolution."""

import pytest
import torch
import torch.nn.functional as F
from deepmim_kernels import gather_patches

MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.1), (0.229, 0.224, 0.225, 0.2, 0.05)


@pytest.mark.parametrize(
    ("batch", "channels", "grid", "patch", "visible"),
    [(1, 1, (1, 1), 7, 1), (2, 3, (2, 3), 8, 2), (3, 5, (3, 2), 14, 6), (2, 3, (2, 2), 16, 1)],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
def test_equals_the_reference(
    device: torch.device,
    batch: int,
    channels: int,
    grid: tuple[int, int],
    patch: int,
    visible: int,
    layout: str,
) -> None:
    torch.manual_seed(0)
    height, width = grid[0] * patch, grid[1] * patch
    pixels = torch.rand(batch, channels, height, 2 * width, device=device) * 255
    pixels = pixels[:, :, :, ::2] if layout == "sliced" else pixels[:, :, :, :width].contiguous()
    if layout == "channels last":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    ids = torch.rand(batch, grid[0] * grid[1], device=device).argsort(dim=1)[:, :visible]
    scale = {"pixel_mean": MEAN[:channels], "pixel_std": STD[:channels]}
    for images in (pixels, pixels.half(), pixels.bfloat16()):
        actual = gather_patches(images, ids, patch_size=patch, backend="triton")
        expected = gather_patches(images, ids, patch_size=patch, backend="torch")
        assert actual.dtype == images.dtype
        assert torch.equal(actual, expected)
    for images in (pixels.to(torch.uint8), (pixels * 257).int().to(torch.uint16)):
        actual = gather_patches(images, ids, patch_size=patch, backend="triton", **scale)
        expected = gather_patches(images, ids, patch_size=patch, backend="torch", **scale)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=4e-6)


def test_linear_with_the_convolution_weight_is_the_patch_embedding(device: torch.device) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 48, device=device)
    conv = torch.nn.Conv2d(3, 20, 16, 16, device=device)
    ids = torch.tensor([[0, 4], [5, 1]], device=device)
    embedded = conv(images).flatten(2).transpose(1, 2)
    expected = embedded.gather(1, ids.unsqueeze(-1).expand(-1, -1, 20))
    pixels = gather_patches(images, ids, patch_size=16, backend="triton")
    actual = F.linear(pixels, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
