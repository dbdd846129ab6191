"""A whole model in one process: the joint reference, and the local backward that trains.

Legend: B images, C channels, L patches, K visible patches, D width, P prediction width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepmim_scale.batch import Batch, Masking, expect_shape, masking_from_noise
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.images import normalize
from deepmim_scale.methods import losses_of
from deepmim_scale.models.blocks import gather_tokens, initialize
from deepmim_scale.models.stage import Stage, State
from deepmim_scale.models.taps import Leaf, detach_tap, fork, gradient_root
from deepmim_scale.objectives import build_objective
from deepmim_scale.presets import load_preset


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
        self.losses = losses_of(config)
        self.objective = build_objective(config)

    def batch(
        self, images: Tensor, noise: Tensor | None, teacher: Tensor | None = None
    ) -> tuple[Batch, Masking]:
        """A batch with its mask from noise [B, L]; fresh noise where none is given.

        ValueError if noise does not fit the images.
        """
        if noise is None:
            noise = torch.rand(len(images), self.config.num_patches, device=images.device)
        expect_shape("noise", noise, "[B, L]", (len(images), self.config.num_patches))
        return Batch(images, noise, teacher=teacher), self._mask(noise)

    def masking(self, images: Tensor, noise: Tensor | None = None) -> Masking:
        """Which patches of images [B, C, H, W] noise [B, L] masks; fresh noise where none is given.

        ValueError if noise does not fit the images.
        """
        return self.batch(images, noise)[1]

    def _mask(self, noise: Tensor) -> Masking:
        return masking_from_noise(noise, self.config.num_visible)

    def forward(
        self,
        images: Tensor,
        *,
        noise: Tensor | None = None,
        teacher: Tensor | None = None,
        predictions: bool = False,
    ) -> Output:
        """Losses of images [B, C, H, W], normalized or uint8; noise [B, L] in [0, 1): the mask.

        `teacher` is what the target's teacher makes of the images, where the target has one.
        `predictions` also returns every decoder's predictions, from full last blocks.
        """
        batch, masking = self.batch(images, noise, teacher)
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
        targets = self.objective.prepare(batch, masking)
        losses = {
            name: self.objective.loss(
                name, [masked[member] for member in loss.decoders], targets, loss.weight
            )
            for name, loss in self.losses.items()
        }
        return Output(self.total(losses), losses, preds if predictions else None)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses, in their order."""
        return torch.stack([losses[name] * loss.weight for name, loss in self.losses.items()]).sum()

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """Tokens [B, L+1, D] after each block, class token first, of whole images [B, C, H, W].

        The last block's tokens are normalized by the encoder's final norm, as its decoder sees
        them.
        """
        hidden = self.embed_whole(images)
        for index, block in self.blocks.items():
            hidden = block(hidden)
            yield self.norm(hidden) if int(index) + 1 == self.config.depth else hidden

    def embed_whole(self, images: Tensor) -> Tensor:
        """Tokens [B, L+1, D] before the first block, of images [B, C, H, W] without a mask."""
        num_patches = self.config.num_patches
        order = torch.arange(num_patches, dtype=torch.float32, device=images.device)
        everything = masking_from_noise(order.expand(len(images), -1), num_patches)
        return self.embed(normalize(images, self.config.pixel_statistics), everything)[0]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """Predictions [B, L-K, P] of the masked patches by the deepest decoder alone."""
        masking = self._mask(noise)
        inputs: dict[str, State] = {}

        def tap(name: str, tensors: State) -> State:
            inputs[name] = tensors
            return tensors

        images = normalize(images, self.config.pixel_statistics)
        self.encode(self.embed(images, masking), tap)
        name = list(inputs)[-1]
        return self.decode(name, inputs[name], masking)


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
    batch, masking = model.batch(images, noise, teacher)
    leaves: dict[str, list[Leaf]] = {}

    def tap(name: str, tensors: State) -> State:
        onward, tapped = zip(*map(detach_tap, tensors), strict=True)
        leaves[name] = list(tapped)
        return onward

    state = model.encode(model.embed(images, masking), tap)
    targets = model.objective.prepare(batch, masking)
    losses = {}
    for name, term in model.losses.items():
        predictions = [
            model.decode(member, tuple(leaf.tensor for leaf in leaves[member]), masking)
            for member in term.decoders
        ]
        loss = model.objective.loss(name, predictions, targets, term.weight)
        losses[name] = loss.detach()
        backward(loss * term.weight)
        # The graph must be gone before the next decoder's is built.
        del loss, predictions
    backward(gradient_root(state, (None,) * len(state)))
    return Output(model.total(losses), losses)


def build_model(
    config: str | ModelConfig | RunConfig | Callable[[], RunConfig],
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Model:
    """The whole model of a config, a preset function or a preset's name, initialized as MAE.

    Weights are drawn from `seed`. `device="meta"` builds the model without memory. UserError for
    an unknown name.
    """
    if isinstance(config, str):
        config = load_preset(config)
    elif callable(config):
        config = config()
    with torch.device(device):
        model = Model(config.model if isinstance(config, RunConfig) else config)
    initialize(model, seed)
    return model
