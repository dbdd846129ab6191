"""Fifty training steps of a small masked autoencoder: kernels and reference give one loss curve."""

import torch
import torch.nn.functional as F
from deepmim_kernels import decoder_assemble, gather_patches, masked_cosine, masked_mse
from torch import Tensor, nn

BATCH, PATCH, SIDE, PATCHES, VISIBLE, WIDTH = 2, 4, 12, 9, 3, 24
SCALE = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}


class DebugModel(nn.Module):
    """Patch embedding, one encoder block, one decoder block, pixel and feature heads."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.register_buffer("pos", torch.randn(1, PATCHES + 1, WIDTH) * 0.1)
        self.encoder, self.decoder = (
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.pixels = nn.Linear(WIDTH, 3 * PATCH**2)
        self.features = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor, noise: Tensor, teacher: Tensor) -> Tensor:
        backend = self.backend
        shuffle = noise.argsort(dim=1)
        visible, masked = shuffle[:, :VISIBLE], shuffle[:, VISIBLE:]
        x = gather_patches(images, visible, patch_size=PATCH, backend=backend, **SCALE)
        x = F.linear(x, self.embed.weight.flatten(1), self.embed.bias)
        x = x + self.pos[:, 1:].expand(len(x), -1, -1).gather(1, wide(visible))
        x = self.encoder(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))
        x = decoder_assemble(x, self.mask_token, self.pos, shuffle.argsort(dim=1), backend=backend)
        x = self.decoder(x)[:, 1:].gather(1, wide(masked))
        pixel_loss = masked_mse(
            self.pixels(x), images, ids=masked, patch_size=PATCH, backend=backend, **SCALE
        )
        return pixel_loss + masked_cosine(self.features(x), teacher, ids=masked, backend=backend)


def wide(ids: Tensor) -> Tensor:
    return ids.unsqueeze(-1).expand(-1, -1, WIDTH)


def loss_curve(backend: str, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    model = DebugModel(backend).to(device)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8).to(device)
    teacher = torch.randn(BATCH, PATCHES, 10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for step in range(50):
        noise = torch.rand(BATCH, PATCHES, generator=torch.Generator().manual_seed(step))
        loss = model(images, noise.to(device), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_loss_curves_agree(device: torch.device) -> None:
    fused, plain = loss_curve("triton", device), loss_curve("torch", device)
    difference = (fused - plain).abs().max().item()
    print(f"50 steps, loss {plain[0]:.4f} -> {plain[-1]:.4f}, largest difference {difference:.2e}")
    assert plain[-1] < plain[0] - 0.3, "the model does not learn"
    assert difference < 1e-4
