"""Command line of the data: `deepmim-scale data samples | scan | stats | verify | pack`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from pydantic import Field

from deepmim_scale.arguments import writable
from deepmim_scale.errors import UserError
from deepmim_scale.settings import FrozenConfig

# A folder of images or containers, in every command alike.
DataPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
Cache = Annotated[str, tyro.conf.arg(metavar="DIR")]


class SamplesArguments(FrozenConfig):
    """Write a small sample set: photographs (scikit-image) and digits (scikit-learn)."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """New folder; gets train/<class> and val/<class>."""


class DigitsArguments(FrozenConfig):
    """Write the sample set's digits by class: what pre-training saw, with labels, and others."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder; gets train/<digit> and val/<digit>."""


class ScanArguments(FrozenConfig):
    """List images and save the list, so that training starts at once."""

    dir: DataPath
    """Image folder (PATH/train/<class> and PATH/val/<class>, or PATH itself), .tar, .zip
    or .parquet file, or a folder of such files."""
    cache: Cache = ""
    """Folder for the lists (default: beside the images)."""
    labels: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Classes of images that lie flat in containers: lines NAME CLASS, or ILSVRC's development kit
    (found by itself beside the containers)."""


class VerifyArguments(FrozenConfig):
    """Decode every image once; lists bad files in verify.json and quarantine.txt.

    Exit code 1 if there are unreadable ones.
    """

    dir: DataPath
    """Image folder (PATH/train/<class> and PATH/val/<class>, or PATH itself), .tar, .zip
    or .parquet file, or a folder of such files."""
    cache: Cache = ""
    """Folder for the lists of bad files (default: beside the images)."""
    threads: int = 2
    """Decoding threads."""
    report: Annotated[str, tyro.conf.arg(name="json")] = ""
    """Also write the reports of all splits to this JSON file."""


def run_digits(arguments: DigitsArguments) -> None:
    """Write the digits that are not there yet."""
    from deepmim_scale.data.samples import labelled_digits

    out = writable("out", Path(arguments.out) / "nothing").parent
    for split in ("train", "val"):
        digits = labelled_digits(split)
        digits.write(out / split, np.arange(len(digits.labels)))
        print(f"{out / split}: {len(digits.labels)} digits")


class PackArguments(FrozenConfig):
    """Write a small copy of all images into one tar, under the ids that they have."""

    dir: DataPath
    """Image folder or containers, as for training."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.tar")]
    """New tar; training takes it as --data."""
    cache: Cache = ""
    """Folder where the listings of PATH are."""
    short_side: int = Field(320, ge=16)
    """Short side of larger images in pixels; smaller ones are copied."""
    quality: int = Field(92, ge=1, le=100)
    """Quality of the JPEGs."""
    threads: int = Field(2, ge=1)
    """Decoding threads."""


def run_pack(arguments: PackArguments) -> None:
    """Write the copy and its index."""
    out = Path(arguments.out)
    if out.suffix != ".tar":
        raise UserError(f"out={out}: must end in .tar, as what it is")
    if out.exists():
        raise UserError(f"out={out}: exists; name a new file")
    writable("out", out)
    from deepmim_scale.data.pack import pack_data

    print(
        pack_data(
            arguments.dir,
            out,
            arguments.cache,
            arguments.short_side,
            arguments.quality,
            arguments.threads,
        )
    )


class StatsArguments(FrozenConfig):
    """Measure channels, bits, mean and standard deviation of the training images.

    They are saved beside the listings, and used by runs with --in-chans of these channels.
    """

    dir: DataPath
    """Image folder or containers, as for training."""
    cache: Cache = ""
    """Folder for the result (default: beside the images)."""
    images: int = Field(10_000, ge=0)
    """Images to look at, evenly spread; 0 for all."""
    threads: int = Field(2, ge=1)
    """Decoding threads."""


def run_stats(arguments: StatsArguments) -> None:
    """Write stats.json and print what is in it, as flags."""
    from deepmim_scale.data.pixel_statistics import measure_data, save_statistics

    path, cache = arguments.dir, arguments.cache
    found = measure_data(path, cache, arguments.images, arguments.threads)
    file = save_statistics(path, cache, found)
    print(f"{file}: {found.channels} channels of {found.bits} bits in {found.images} images")
    mean, std = (" ".join(f"{x:g}" for x in values) for values in (found.mean, found.std))
    print(f"--in-chans {found.channels} --pixel-bits {found.bits}")
    print(f"--pixel-mean {mean} --pixel-std {std}")


def run_samples(arguments: SamplesArguments) -> None:
    """Write the sample set, or say that it is there."""
    try:
        from deepmim_scale.data.samples import write_samples

        written = write_samples(arguments.out)
    except ImportError as error:
        raise UserError(
            f"samples: needs {error.name}; pip install scikit-image scikit-learn"
        ) from error
    print(f"{arguments.out}: {'written' if written else 'is there already'}")


def run_scan(arguments: ScanArguments) -> None:
    """Write the listing of each split and print what is in it."""
    from deepmim_scale.data.open_source import find_kind

    scan = find_kind(arguments.dir).scan
    for line in scan(arguments.dir, arguments.cache, arguments.labels) if scan else ():
        print(line)


def run_verify(arguments: VerifyArguments) -> None:
    """Check each split; training never uses the files in its quarantine.txt."""
    if arguments.threads < 1:
        raise UserError(f"threads={arguments.threads}: must be positive; one per CPU core is best")
    if arguments.report:
        writable("json", arguments.report)
    from deepmim_scale.data.open_source import find_kind
    from deepmim_scale.data.source import printable

    verify = find_kind(arguments.dir).verify
    reports = verify(arguments.dir, arguments.cache, arguments.threads) if verify else []
    for report in reports:
        counts = "{good} of {images} images good, {unreadable} unreadable, {damaged} damaged"
        print(f"{printable(report['folder'])}: {counts.format(**report)}")
        for finding in report["bad"]:
            print(f"  {printable(finding['file'])}: {finding['kind']}: {finding['reason']}")
    if arguments.report:
        Path(arguments.report).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if any(report["unreadable"] for report in reports):
        sys.exit(1)
