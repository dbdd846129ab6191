"""A whole model in one process: the joint reference, and the local backward that trains.

Legend: B images, C channels, L patches, K visible patches, P prediction width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepmim_scale.batch import Masking, masking_from_noise
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.models.blocks import gather_tokens, initialize
from deepmim_scale.models.stage import Stage, State, loss_members, loss_weight
from deepmim_scale.models.taps import Leaf, detach_tap, fork, gradient_root


@dataclass
class Output:
    """What a model returns."""

    loss: Tensor
    """Total, scalar."""
    losses: dict[str, Tensor]
    """Loss of each decoder or pair, scalars, unweighted."""
    predictions: dict[str, Tensor] | None = None
    """Each decoder's predictions [B, L, P] of all patches; only if asked for."""


class Model(Stage):
    """All stages in one: `model(images, noise=noise)` is plain autograd and the reference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, 1, config.depth)

    def masking(
        self, images: Tensor, noise: Tensor | None, teacher: Tensor | None = None
    ) -> Masking:
        """Masking of noise [B, L]; fresh noise where none is given.

        ValueError if noise or teacher does not fit the images.
        """
        size, length, visible = len(images), self.config.num_patches, self.config.num_visible
        if noise is None:
            noise = torch.rand(size, length, device=images.device)
        _expect("noise", noise, "[B, L]", (size, length))
        if teacher is not None:
            features = self.config.loss == "cosine"
            legend, tokens = ("L+1", length + 1) if features else ("L-K", length - visible)
            shape = (size, tokens, self.config.out_dim)
            _expect("teacher", teacher, f"[B, {legend}, P]", shape)
        return masking_from_noise(noise, visible)

    def forward(
        self,
        images: Tensor,
        *,
        noise: Tensor | None = None,
        teacher: Tensor | None = None,
        predictions: bool = False,
    ) -> Output:
        """Losses of images [B, C, H, W], normalized or uint8; noise [B, L] in [0, 1): the mask.

        `predictions` also returns every decoder's predictions, from full last blocks.
        """
        masking = self.masking(images, noise, teacher)
        inputs: dict[str, State] = {}

        def tap(name: str, tensors: State) -> State:
            onward, inputs[name] = zip(*map(fork, tensors), strict=True)
            return onward

        self.encode(self.embed(images, masking), tap)
        preds = {
            name: self.decoders[name](*tensors, masking=masking, full=predictions)
            for name, tensors in inputs.items()
        }
        masked = preds
        if predictions:
            masked = {name: gather_tokens(p, masking.ids_masked) for name, p in preds.items()}
        criterion = self.criterion(images, masking, teacher)
        losses = {
            name: criterion(name, [masked[member] for member in members])
            for name, members in loss_members(self.config).items()
        }
        return Output(self.total(losses), losses, preds if predictions else None)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses, in their order."""
        weight = loss_weight(self.config)
        return torch.stack([loss * weight for loss in losses.values()]).sum()


def _expect(name: str, tensor: Tensor, legend: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}; must be {legend}={list(shape)}")


def local_backward(
    model: Model,
    images: Tensor,
    *,
    noise: Tensor | None = None,
    teacher: Tensor | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Output:
    """Forward and backward of one micro-batch, decoder by decoder; losses come back detached.

    Each decoder runs forward and backward on the detached tap at once, so that no two decoders'
    activations are alive together; the encoder's backward then takes up the taps' gradients. The
    gradients equal `model(...).loss.backward()` bit for bit. `backward` is called with scalars
    (`engine.backward` under DeepSpeed).
    """
    masking = model.masking(images, noise, teacher)
    leaves: dict[str, list[Leaf]] = {}

    def tap(name: str, tensors: State) -> State:
        onward, held = zip(*map(detach_tap, tensors), strict=True)
        leaves[name] = list(held)
        return onward

    state = model.encode(model.embed(images, masking), tap)
    criterion = model.criterion(images, masking, teacher)
    losses = {}
    for name, members in loss_members(model.config).items():
        predictions = [
            model.decode(member, tuple(leaf.tensor for leaf in leaves[member]), masking)
            for member in members
        ]
        loss = criterion(name, predictions)
        losses[name] = loss.detach()
        backward(loss * loss_weight(model.config))
        del loss, predictions
    backward(gradient_root(state, (None,) * len(state)))
    return Output(model.total(losses), losses)


def build_model(
    config: ModelConfig | RunConfig | Callable[[], RunConfig], *, seed: int = 0, device: str = "cpu"
) -> Model:
    """The whole model of a config or of a preset function, initialized as MAE from `seed`.

    `device="meta"` builds it without memory.
    """
    if callable(config):
        config = config()
    with torch.device(device):
        model = Model(config.model if isinstance(config, RunConfig) else config)
    initialize(model, seed)
    return model
