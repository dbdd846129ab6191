"""What each decoder paints: pictures of validation images, and the error against a plain guess.

Legend: N images, C channels, H x W an image, L patches, P pixels of a patch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deepmim_scale.analysis.images import open_validation
from deepmim_scale.batch import Batch
from deepmim_scale.config import RunConfig
from deepmim_scale.data.step_loader import iter_validation
from deepmim_scale.errors import UserError
from deepmim_scale.images import (
    normalize,
    patch_statistics,
    patchify,
    to_pixels,
    unpatchify,
)
from deepmim_scale.methods import losses_of
from deepmim_scale.models import Model
from deepmim_scale.models.blocks import gather_tokens
from deepmim_scale.objectives import objective_of

NUM_CLASSES, NUM_SPREAD = 5, 5
# What a masked patch is guessed to be, by norm_pix: a name and its meaning. With norm_pix the
# pictures are made with each masked patch's statistics, so the guess must know its mean.
GUESSES = {
    False: ("visible mean", "the visible patches' mean"),
    True: ("patch mean", "each masked patch's own mean"),
}
GIVEN = "norm_pix: masked patches' true mean and deviation are given"
GRAY = 0.0  # of normalized pixels: the mean color


@torch.no_grad()
def reconstruct(model: Model, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Masked input and each loss's picture, both [N, C, H, W] normalized, visible patches kept.

    images [N, C, H, W] normalized, noise [N, L]. MIRL's pictures are the sums of its pairs. Patch
    statistics of the original bring norm_pix predictions back to pixels, as in MAE's demo.
    """
    config = model.config
    if not objective_of(config).is_pixels:
        raise UserError(f"target={config.target}: predicts features; pictures need target pixel")
    masking = model.masking(images, noise)
    out = model(images, noise=noise, predictions=True)
    assert out.predictions is not None, "predictions were asked for"
    patches = patchify(images, config.patch_size)
    ids = masking.ids_masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])

    def picture(values: Tensor) -> Tensor:
        filled = patches.scatter(1, ids, values.gather(1, ids))
        return unpatchify(filled, config.patch_size, config.in_chans, config.grid)

    pictures = {}
    for name, loss in losses_of(config).items():
        values = torch.stack([out.predictions[member] for member in loss.decoders]).sum(0)
        if config.norm_pix:
            mean, std = patch_statistics(patches)
            values = values * std + mean
        pictures[name] = picture(values)
    return picture(torch.full_like(patches, GRAY)), pictures


def plain_guess(images: Tensor, model: Model, noise: Tensor) -> Tensor:
    """Images [N, C, H, W] with each masked patch guessed as GUESSES says."""
    config, masking = model.config, model.masking(images, noise)
    patches = patchify(images, config.patch_size)
    if config.norm_pix:
        guess, _ = patch_statistics(patches)
    else:
        visible = gather_tokens(patches, masking.ids_visible).unflatten(-1, (-1, config.in_chans))
        guess = visible.mean((1, 2)).repeat(1, config.patch_size**2).unsqueeze(1)
    ids = masking.ids_masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    filled = patches.scatter(1, ids, guess.expand_as(patches).gather(1, ids))
    return unpatchify(filled, config.patch_size, config.in_chans, config.grid)


def validation_errors(model: Model, batches: list[Batch]) -> dict[str, float]:
    """Mean squared error of masked pixels per decoder, and of the guess, in normalized pixels."""
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        images = normalize(batch.images, model.config.pixel_statistics)
        _, pictures = reconstruct(model, images, batch.noise)
        pictures[GUESSES[model.config.norm_pix][0]] = plain_guess(images, model, batch.noise)
        for name, picture in pictures.items():
            sums[name] = sums.get(name, 0.0) + (picture - images).square().sum().item()
        masked = model.config.num_patches - model.config.num_visible
        count += len(images) * masked * model.config.in_chans * model.config.patch_size**2
    return {name: total / count for name, total in sums.items()}


def draw(model: Model, batch: Batch, path: Path) -> None:
    """A PNG: a row per image; masked input, every decoder's picture, original."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = normalize(batch.images, model.config.pixel_statistics)
    masked, pictures = reconstruct(model, images, batch.noise)
    columns = {"masked": masked, **pictures, "original": images}
    figure, axes = pyplot.subplots(
        len(images), len(columns), figsize=(1.3 * len(columns), 1.3 * len(images)), squeeze=False
    )
    for column, (title, values) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        # Of other than three channels the first three stand for red, green and blue.
        pixels = to_pixels(values, model.config.pixel_statistics)
        shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
        for row, image in enumerate(shown):
            axes[row, column].imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row, column].axis("off")
    top = 1.0
    if model.config.norm_pix:
        top -= 0.2 / figure.get_figheight()  # inches
        figure.suptitle(GIVEN, fontsize=8, y=1, va="top")
    figure.tight_layout(pad=0.2, rect=(0, 0, 1, top))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def validation(config: RunConfig, data: str) -> list[Batch]:
    """The validation images of `data` with their fixed masks; UserError if it has none."""
    return list(iter_validation(config, open_validation(data, config.cache)))


def pick_examples(batches: list[Batch]) -> Batch:
    """One image of each of the first classes, then images spread over the whole set."""
    labels = [label for batch in batches if batch.labels is not None for label in batch.labels]
    first = {int(label): i for i, label in reversed(list(enumerate(labels)))}
    step = max(len(labels) // NUM_SPREAD, 1)
    spread = range(step // 2, len(labels), step)
    chosen = list(dict.fromkeys([*sorted(first.values())[:NUM_CLASSES], *spread[:NUM_SPREAD]]))
    keys = batches[0].tensors()
    return Batch(
        **{key: torch.cat([batch.tensors()[key] for batch in batches])[chosen] for key in keys}
    )
