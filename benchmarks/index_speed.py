"""How long an index of a large container takes, and what a training process pays for it.

Writes a sparse tar of as many entries as ImageNet has, with real headers and no pixels, scans it as
`data scan` does, and opens it in a process of its own as training does: index, labels, sample plan
and the permutation of an epoch.

    python benchmarks/index_speed.py --entries 1281167
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_BYTES = 110_000  # ImageNet's mean
BLOCK = 512
START = """
import resource, sys, time
from deepmim_scale.data.open_source import open_source
from deepmim_scale.data.sample_plan import SamplePlan
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
source = open_source(sys.argv[1], "train")
SamplePlan(len(source), 0, 4096).sample_ids(0)
source.labels.astype("int64"), source.sizes, source.describe()
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"start: {len(source):,} images in {seconds:.2f} s, {(after - before) / 1e3:.0f} MB")
print(f"the process has {after / 1e3:.0f} MB")
"""


def write_sparse_tar(path: Path, entries: int) -> None:
    """A tar of 1000 classes whose members begin as a JPEG and are holes otherwise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (375, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg")
    head = buffer.getvalue()[: 2 * BLOCK]
    member = tarfile.TarInfo()
    member.size = IMAGE_BYTES
    stride = BLOCK + -(-IMAGE_BYTES // BLOCK) * BLOCK
    with path.open("wb") as file:
        for i in range(entries):
            member.name = f"train/n{i % 1000:08}/n{i % 1000:08}_{i // 1000}.JPEG"
            file.seek(i * stride)
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + head)
        file.seek(entries * stride)
        file.write(bytes(2 * BLOCK))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=1_281_167)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "images.tar"
        write_sparse_tar(path, arguments.entries)
        command = [sys.executable, "-m", "deepmim_scale.cli", "data", "scan", str(path)]
        began = time.perf_counter()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        index = path.with_name("images.tar.index") / "train" / "index.npz"
        print(
            f"scan: {arguments.entries:,} entries in {seconds:.1f} s, "
            f"{used.ru_utime + used.ru_stime:.1f} CPU s, {used.ru_maxrss / 1e3:.0f} MB; "
            f"index {index.stat().st_size / 1e6:.0f} MB; load {os.getloadavg()[0]:.1f}"
        )
        print(subprocess.check_output([sys.executable, "-c", START, str(path)], text=True), end="")


if __name__ == "__main__":
    main()
