"""Command line of the data: `deepmim-scale data samples DIR | scan DIR | verify DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.errors import UserError
from deepmim_scale.settings import FrozenConfig

# A folder of images, in every command alike.
ImageFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
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
    """List an image folder and save its manifest, so that training starts at once."""

    dir: ImageFolder
    """Image folder: DIR/train/<class> and DIR/val/<class>, or DIR itself."""
    cache: Cache = ""
    """Folder for the manifests (default: beside the images)."""


class VerifyArguments(FrozenConfig):
    """Decode every image once; lists bad files in verify.json and quarantine.txt.

    Exit code 1 if there are unreadable ones.
    """

    dir: ImageFolder
    """Image folder: DIR/train/<class> and DIR/val/<class>, or DIR itself."""
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
    """Write each split's manifest.npz and print what it lists."""
    from deepmim_scale.data.cache import MANIFEST_NAME
    from deepmim_scale.data.manifest import scan_folder

    for folder, listings in _split_folders(arguments.dir, arguments.cache):
        manifest = scan_folder(folder)
        manifest.save(listings / MANIFEST_NAME)
        for line in (manifest.describe(), *manifest.notes):
            print(line)
        unreadable = int((manifest.sizes[:, 0] == 0).sum())
        if unreadable:
            command = f"deepmim-scale data verify {arguments.dir}"
            print(f"{unreadable} headers cannot be read; run `{command}`")


def run_verify(arguments: VerifyArguments) -> None:
    """Check each split's folder; training never uses the files in its quarantine.txt."""
    if arguments.threads < 1:
        raise UserError(f"threads={arguments.threads}: must be positive; one per CPU core is best")
    if arguments.report:
        writable("json", arguments.report)
    from deepmim_scale.data.source import printable
    from deepmim_scale.data.verify import verify_folder

    folders = _split_folders(arguments.dir, arguments.cache)
    reports = [verify_folder(folder, arguments.threads, listings) for folder, listings in folders]
    for report in reports:
        counts = "{good} of {images} images good, {unreadable} unreadable, {damaged} damaged"
        print(f"{printable(report['folder'])}: {counts.format(**report)}")
        for finding in report["bad"]:
            print(f"  {printable(finding['file'])}: {finding['kind']}: {finding['reason']}")
    if arguments.report:
        Path(arguments.report).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if any(report["unreadable"] for report in reports):
        sys.exit(1)


def _split_folders(data: str, cache: str) -> list[tuple[Path, Path]]:
    """The folder of each split, and where its listings are written; UserError if they cannot."""
    from deepmim_scale.data.cache import listing_folder
    from deepmim_scale.data.folder_source import find_split

    folders = [find_split(data, "train"), find_split(data, "val")]
    return [(folder, listing_folder(folder, cache)) for folder in folders if folder]
