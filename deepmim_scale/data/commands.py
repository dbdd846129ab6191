"""Command line of the data: `deepmim-scale data samples OUT | scan DIR | verify DIR`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from deepmim_scale.arguments import writable
from deepmim_scale.errors import UserError
from deepmim_scale.settings import FrozenConfig


class SamplesArgs(FrozenConfig):
    """Write a small sample set: photographs (scikit-image) and digits (scikit-learn)."""

    out: tyro.conf.Positional[str]
    """New folder; gets train/<class> and val/<class>."""


class ScanArgs(FrozenConfig):
    """List an image folder and save its manifest, so that training starts at once."""

    dir: tyro.conf.Positional[str]
    """Image folder: DIR/train/<class> and DIR/val/<class>, or DIR itself."""


class VerifyArgs(FrozenConfig):
    """Decode every image once; lists bad files in DIR/verify.json and DIR/quarantine.txt.

    Exit code 1 if there are unreadable ones.
    """

    dir: tyro.conf.Positional[str]
    """Image folder: DIR/train/<class> and DIR/val/<class>, or DIR itself."""
    threads: int = 2
    """DecodeStream threads."""
    report: Annotated[str, tyro.conf.arg(name="json")] = ""
    """Also write the reports of all splits to this JSON file."""


def run_samples(args: SamplesArgs) -> None:
    """Write the sample set, or say that it is there."""
    try:
        from deepmim_scale.data.samples import write_samples

        written = write_samples(args.out)
    except ImportError as error:
        raise UserError(
            f"samples: needs {error.name}; pip install scikit-image scikit-learn"
        ) from error
    print(f"{args.out}: {'written' if written else 'is there already'}")


def run_scan(args: ScanArgs) -> None:
    """Write manifest.npz into each split's folder and print what it lists."""
    from deepmim_scale.data.manifest import MANIFEST_NAME, scan_folder

    for folder in _split_folders(args.dir):
        manifest = scan_folder(folder)
        manifest.save(folder / MANIFEST_NAME)
        for line in (manifest.describe(), *manifest.notes):
            print(line)
        unreadable = int((manifest.heights == 0).sum())
        if unreadable:
            print(
                f"{unreadable} headers cannot be read; run `deepmim-scale data verify {args.dir}`"
            )


def run_verify(args: VerifyArgs) -> None:
    """Check each split's folder; training leaves the files in its quarantine.txt out."""
    if args.threads < 1:
        raise UserError(f"threads={args.threads}: must be positive; one per CPU core is best")
    if args.report:
        writable("json", args.report)
    from deepmim_scale.data.manifest import printable
    from deepmim_scale.data.verify import verify_folder

    reports = [verify_folder(folder, args.threads) for folder in _split_folders(args.dir)]
    for report in reports:
        counts = "{good} of {images} images good, {unreadable} unreadable, {damaged} damaged"
        print(f"{printable(report['folder'])}: {counts.format(**report)}")
        for finding in report["bad"]:
            print(f"  {printable(finding['file'])}: {finding['kind']}: {finding['reason']}")
    if args.report:
        Path(args.report).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if any(report["unreadable"] for report in reports):
        sys.exit(1)


def _split_folders(data: str) -> list[Path]:
    from deepmim_scale.data.manifest import find_split

    folders = [folder for split in ("train", "val") if (folder := find_split(data, split))]
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise UserError(f"dir={folder}: is not writable, results are kept beside the images")
    return folders
