"""What `data stats` finds: channels, bits, mean and standard deviation of a data set's images.

Without it images are RGB of 8 bits, normalized by ImageNet's statistics. Legend: C channels.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepmim_scale.arguments import writable
from deepmim_scale.config import RunConfig
from deepmim_scale.data.cache import STATISTICS_NAME
from deepmim_scale.data.open_source import find_kind, open_source
from deepmim_scale.data.source import Source, good_ids
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json

DIGITS = 6  # as they are printed, so that they can be typed
_RGB_ONLY = {"loader": ("dali",), "decode": ("fast", "mixed")}
PICTURE_CHANNELS = (1, 2, 3, 4)  # gray, RGB and CMYK with or without alpha: PIL makes RGB of them


@dataclass(frozen=True)
class DataStatistics:
    """One line per field of stats.json; every image counts alike."""

    images: int
    """How many were looked at."""
    channels: int
    bits: int
    mean: tuple[float, ...]
    """Of each channel, of pixels scaled to [0, 1]."""
    std: tuple[float, ...]


class _Moments(NamedTuple):
    """Of one image."""

    kind: tuple[int, int]
    """Channels and bits."""
    mean: np.ndarray
    """Float64 [C]."""
    square: np.ndarray
    """Mean of the squares, float64 [C]."""


def measure_data(path: str, cache: str, count: int, threads: int) -> DataStatistics:
    """Look at `count` training images, evenly spread over the ids; 0 for all.

    UserError for images of different kinds that are not all pictures, or a constant channel.
    """
    from deepmim_scale.data.torch_backend import decode_image, decode_stored

    source = open_source(path, "train", "replace", cache)
    assert source is not None, "a source raises where there is nothing to train on"
    ids = good_ids(source)
    if 0 < count < len(ids):
        ids = ids[np.linspace(0, len(ids) - 1, count).round().astype(np.int64)]
    moments = _all_moments(source, ids, decode_stored, threads)
    kinds = Counter(image.kind for image in moments)
    if len(kinds) > 1:
        if any(bits != 8 or channels not in PICTURE_CHANNELS for channels, bits in kinds):
            found = ", ".join(f"{n} have {c} of {b} bits" for (c, b), n in kinds.most_common(3))
            raise UserError(f"data={path}: channels differ: {found}; give each kind its own folder")
        moments = _all_moments(source, ids, decode_image, threads)
    channels, bits = moments[0].kind
    mean = np.mean([image.mean for image in moments], axis=0)
    std = np.sqrt(np.maximum(np.mean([image.square for image in moments], axis=0) - mean**2, 0))
    if not std.all():
        number = int(np.argmin(std))
        raise UserError(f"data={path}: channel {number} (from 0) is constant; leave it out")
    rounded = (tuple(float(f"{x:.{DIGITS}g}") for x in values) for values in (mean, std))
    return DataStatistics(len(moments), channels, bits, *rounded)


def save_statistics(path: str, cache: str, statistics: DataStatistics) -> Path:
    """Write stats.json beside the listings of the training images; UserError if that cannot be."""
    place = find_kind(path).listing
    if place is None:
        raise UserError(f"data={path}: has no place for statistics; give them to the run as flags")
    file = writable("cache", place(path, cache, STATISTICS_NAME, True))
    file.write_text(json.dumps(asdict(statistics), indent=1) + "\n", encoding="utf-8")
    return file


def load_statistics(path: str, cache: str) -> DataStatistics | None:
    """What `data stats` wrote, if it did; UserError for a damaged file."""
    place = find_kind(path).listing
    file = place(path, cache, STATISTICS_NAME, False) if place else None
    if file is None or not file.is_file():
        return None
    values = read_json(file)
    try:
        mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
        images, channels, bits = (int(values[key]) for key in ("images", "channels", "bits"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"data={path}: {file} is damaged; run `data stats` again") from None
    return DataStatistics(images, channels, bits, mean, std)


def with_statistics(config: RunConfig) -> RunConfig:
    """The run with bits, mean and deviation of its data, unless they are given or ImageNet's.

    UserError for channels that the data do not have.
    """
    model = config.model
    if model.pixel_mean:
        return config
    found = load_statistics(config.data, config.cache)
    converts = found is None or found.channels in PICTURE_CHANNELS
    if (
        model.in_chans == 3
        and converts
        and (found is None or (found.channels, found.bits) != (3, 16))
    ):
        return config
    if found is None:
        raise UserError(
            f"in_chans={model.in_chans}: {config.data} has no statistics of its channels; run "
            f"`deepmim-scale data stats {config.data}`"
        )
    if found.channels != model.in_chans:
        raise UserError(
            f"in_chans={model.in_chans}: the images of {config.data} have {found.channels} "
            f"channels; use --in-chans {found.channels}"
        )
    given = {"pixel_bits": found.bits, "pixel_mean": found.mean, "pixel_std": found.std}
    return config.replace(model=model.replace(**given))


def check_pixels(config: RunConfig, source: Source) -> None:
    """UserError unless the first good image is of the run's channels and bits.

    And for a decoder that does not know them.
    """
    from deepmim_scale.data.backend import BadImage, WrongPixels
    from deepmim_scale.data.torch_backend import image_reader

    image = config.model.image_format
    for key, rgb_only in _RGB_ONLY.items():
        value = getattr(config, key)
        if value in rgb_only and not image.is_rgb:
            raise UserError(f"{key}={value}: is for RGB of 8 bits, not {image.kind}; use auto")
    sample = int(good_ids(source)[0])
    try:
        image_reader(source, image)(sample)
    except WrongPixels as error:
        raise UserError(f"in_chans={config.model.in_chans}: {error}; see `data stats`") from None
    except BadImage:
        pass  # a bad file, of which --on-bad decides


def _all_moments(
    source: Source, ids: np.ndarray, decode: Callable[[bytes], np.ndarray], threads: int
) -> list[_Moments]:
    """Of the images that can be read; UserError if there are none."""
    from tqdm import tqdm

    from deepmim_scale.data.ordered import map_in_order

    look = functools.partial(_moments, source, decode)
    found = map_in_order(look, ids.tolist(), threads)
    progress = tqdm(found, total=len(ids), unit="img", desc="stats", disable=None)
    moments = [image for image in progress if image is not None]
    if not moments:
        raise UserError(f"data={source.location}: no image can be decoded; run `data verify`")
    return moments


def _moments(
    source: Source, decode: Callable[[bytes], np.ndarray], sample_id: int
) -> _Moments | None:
    from deepmim_scale.data.backend import BadImage

    try:
        pixels = decode(source.read(sample_id))
    except (OSError, BadImage):
        return None
    values = pixels.reshape(-1, pixels.shape[2]).astype(np.float64) / np.iinfo(pixels.dtype).max
    kind = (pixels.shape[2], 8 * pixels.itemsize)
    return _Moments(kind, values.mean(0), np.square(values).mean(0))
