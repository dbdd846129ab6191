"""Philox equals its published vectors and Triton; masks are a function of seed, epoch, sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepmim_scale.data.masks import mask_noise
from deepmim_scale.data.philox import VALIDATION_MASK, philox, scale_to


@pytest.mark.parametrize(
    ("seed", "counters", "expected"),
    [  # kat_vectors of Random123, philox4x32-10
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(seed: int, counters: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(int(lane) for lane in philox(seed, *counters)) == expected


def test_triton_draws_the_same_integers(tmp_path: Path) -> None:
    """The interpreter must be chosen before triton is imported, hence another process."""
    script = tmp_path / "draw.py"
    script.write_text(
        textwrap.dedent("""
        import json, torch, triton, triton.language as tl

        @triton.jit
        def draw(out, seed, epoch, stream, B: tl.constexpr, DRAWS: tl.constexpr):
            draws = tl.arange(0, DRAWS)[None, :] + tl.zeros((B, 1), tl.int32)
            ids = tl.arange(0, B)[:, None] * 1000003 + tl.zeros((1, DRAWS), tl.int32)
            zero = tl.zeros((B, DRAWS), tl.int32)
            c0, c1, c2, c3 = tl.philox(seed, draws, ids, zero + epoch, zero + stream)
            at = out + (tl.arange(0, B)[:, None] * DRAWS + draws) * 4
            tl.store(at, c0.to(tl.int64)); tl.store(at + 1, c1.to(tl.int64))
            tl.store(at + 2, c2.to(tl.int64)); tl.store(at + 3, c3.to(tl.int64))

        out = torch.zeros(4, 16, 4, dtype=torch.int64)
        draw[(1,)](out, 0x123456789ABCDEF, 7, 3, B=4, DRAWS=16)
        print(json.dumps(out.tolist()))
        """)
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.check_output([sys.executable, str(script)], env=environment, text=True)
    ids = (np.arange(4) * 1000003)[:, None]
    ours = np.stack(philox(0x123456789ABCDEF, np.arange(16), ids, 7, 3), axis=-1)
    np.testing.assert_array_equal(np.array(json.loads(output), np.uint32), ours)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2000),
    listed=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9),
    num_patches=st.integers(1, 70),
    split=st.integers(0, 9),
)
def test_noise_depends_on_nothing_but_its_key(
    seed: int, epoch: int, listed: list[int], num_patches: int, split: int
) -> None:
    ids = np.array(listed)
    whole = mask_noise(seed, epoch, ids, num_patches)
    assert whole.shape == (len(ids), num_patches)
    assert whole.dtype == np.float32
    assert (whole >= 0).all()
    assert (whole < 1).all()
    np.testing.assert_array_equal(whole * 2**24, np.rint(whole * 2**24))
    parts = [mask_noise(seed, epoch, part, num_patches) for part in np.split(ids, [split])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_noise_is_uniform_and_keys_matter() -> None:
    noise = mask_noise(0, 0, np.arange(2000), 64)
    assert abs(noise.mean() - 0.5) < 0.003
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.1
    masked = np.argsort(noise, axis=1, kind="stable")[:, 16:]  # 48 of 64 patches
    share = np.bincount(masked.ravel(), minlength=64) / 2000
    assert np.abs(share - 0.75).max() < 0.05
    others = [
        mask_noise(1, 0, np.arange(2000), 64),
        mask_noise(0, 1, np.arange(2000), 64),
        mask_noise(0, 0, np.arange(2000), 64, VALIDATION_MASK),
        mask_noise(0, 0, np.arange(1, 2001), 64),
    ]
    for other in others:
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31))
def test_below_is_the_exact_multiple(random: int, limit: int) -> None:
    assert scale_to(np.array([random], np.uint32), np.array([limit]))[0] == random * limit >> 32
