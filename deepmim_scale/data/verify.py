"""Decode every image of a data set once and list the bad ones, which training then replaces.

A header check misses truncation and flipped bits: only a full decode shows them, and flipped bits
only as a warning that libjpeg writes to stderr, so that is captured.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deepmim_scale.data.backend import BadImage
from deepmim_scale.data.cache import QUARANTINE_NAME, REPORT_NAME
from deepmim_scale.data.manifest import list_images, listing_sha
from deepmim_scale.data.native_pixels import is_npy, is_tiff
from deepmim_scale.data.source import printable
from deepmim_scale.data.torch_backend import decode_image, decode_stored

CHUNK = 64
STATE_NAME = ".verify.jsonl"

Finding = tuple[str, str, str]  # name, "unreadable" or "damaged", reason


def verify_folder(root: Path, threads: int, results: Path | None = None) -> dict[str, Any]:
    """Check all images of a folder; the results lie beside them if `results` is not given."""
    listing, _ = list_images(root)
    names, sha = [name for name, _ in listing], listing_sha(listing)

    def read(i: int) -> bytes:
        return (root / names[i]).read_bytes()

    return verify_images(str(root), names, sha, read, threads, results or root)


def verify_images(
    location: str,
    names: Sequence[str],
    sha: str,
    read: Callable[[int], bytes],
    threads: int,
    results: Path,
) -> dict[str, Any]:
    """Check all images; writes verify.json and quarantine.txt into `results`, returns the report.

    `read` gives the bytes of image i and may raise OSError. An interrupted check goes on where it
    stopped, as long as `sha` is the same.
    """
    state = results / STATE_NAME
    done, bad = _resume(state, sha)
    with (
        ThreadPoolExecutor(threads) as pool,
        state.open("a", encoding="utf-8") as log,
        tqdm(total=len(names), initial=done, unit="img", disable=None) as progress,
    ):
        for start in range(done, len(names), CHUNK):
            chunk = range(start, min(start + CHUNK, len(names)))
            found = _check_chunk(names, read, chunk, pool)
            bad += found
            print(json.dumps({"sha": sha, "done": chunk.stop, "bad": found}), file=log)
            log.flush()
            progress.update(len(chunk))
            progress.set_postfix(bad=len(bad))
    kinds = Counter(kind for _, kind, _ in bad)
    report = {
        "folder": location,
        "sha": sha,
        "images": len(names),
        "good": len(names) - len(bad),
        "unreadable": kinds["unreadable"],
        "damaged": kinds["damaged"],
        "bad": [{"file": name, "kind": kind, "reason": reason} for name, kind, reason in bad],
    }
    _write(results / REPORT_NAME, json.dumps(report, indent=1) + "\n")
    lines = (f"{printable(name)}\t{kind}: {reason}\n" for name, kind, reason in bad)
    _write(results / QUARANTINE_NAME, "".join(lines))
    state.unlink()
    return report


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Redirect file descriptor 2, which C libraries write to; the function returned reads it."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 1 << 16, 0).decode(errors="replace")
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _check_chunk(
    names: Sequence[str], read: Callable[[int], bytes], chunk: range, pool: ThreadPoolExecutor
) -> list[Finding]:
    with captured_stderr() as text:
        reasons = list(pool.map(lambda i: _unreadable(read, i), chunk))
        warned = bool(text())
    found: list[Finding] = []
    for i, reason in zip(chunk, reasons, strict=True):
        if reason:
            found.append((names[i], "unreadable", reason))
        elif warned:  # somebody's warning: this file's?
            with captured_stderr() as text:
                _unreadable(read, i)
                lines = text().splitlines()
            if lines:
                found.append((names[i], "damaged", lines[0]))
    return found


def _unreadable(read: Callable[[int], bytes], i: int) -> str | None:
    try:
        data = read(i)
        (decode_stored if is_npy(data) or is_tiff(data) else decode_image)(data)
    except OSError as error:
        return error.strerror or str(error)
    except BadImage as error:
        return str(error)
    return None


def _resume(state: Path, sha: str) -> tuple[int, list[Finding]]:
    done = 0
    bad: list[Finding] = []
    if state.exists():
        for line in state.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the line that was being written
                entry = json.loads(line)
                if entry["sha"] == sha:
                    done, bad = entry["done"], bad + [tuple(finding) for finding in entry["bad"]]
        if done == 0:
            state.unlink()
    return done, bad


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
