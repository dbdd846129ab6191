"""Silent corruption in two replicas: single flipped bits, and an update that comes out wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from free_port import free_port

from deepmim_scale.faults import parse_fault
from deepmim_scale.train.inject import flip_file

SCRIPT = Path(__file__).with_name("digests.py")


def check_flips(flips: int, folder: Path) -> None:
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    path = os.pathsep.join(filter(None, [str(SCRIPT.parent), *sys.path]))
    done = subprocess.run(
        [*command, str(SCRIPT), str(flips), str(folder / "found.json")],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    print(found)
    assert found["false"] == 0, "no alarm where nothing was flipped"
    for kind in ("weights", "masters", "moments"):
        assert found[kind] == [flips, flips], f"{kind}: found, and named the rank"
    (line,) = found["update"]
    assert line.startswith("rank 1 on ")
    assert "an update differs from its neighbor's" in line


def test_flips_are_found(tmp_path: Path) -> None:
    check_flips(4, tmp_path)


@pytest.mark.soak
def test_100_flips_are_found(tmp_path: Path) -> None:
    check_flips(100, tmp_path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("explode:step=3", "unknown fault; choose one of kill, hang, slow, nan, bitflip, enospc"),
        ("kill", "must be KIND:rank=R,step=N, as kill:rank=2,step=7"),
        ("kill:rank=x,step=1", "must be KIND:rank=R,step=N"),
        ("kill:step=0", "must be KIND:rank=R,step=N"),
        ("kill:step=1,when=now", "must be KIND:rank=R,step=N"),
        ("bitflip:step=1,of=images", "of must be one of weights, moments, checkpoint"),
    ],
)
def test_bad_faults(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"inject={text}: {rule}"):
        parse_fault(text)


def test_a_bit_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    flip_file(file, 83)
    assert file.read_bytes() == b"\x08" + bytes(9), "bit 83 of 80 is bit 3"
