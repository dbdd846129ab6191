"""Order, crops and flips: exactly once, equal for every split of the batch, restart-proof."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from deepmim_scale.data.philox import ORDER, philox
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips, permutation
from deepmim_scale.errors import UserError


@given(st.integers(0, 2**64 - 1), st.integers(0, 3000), st.integers(1, 300))
def test_permutation_sorts_its_keys(seed: int, epoch: int, num_samples: int) -> None:
    words = [philox(seed, 0, i, epoch, ORDER)[:2] for i in range(num_samples)]
    keys = [int(high) << 32 | int(low) for high, low in words]
    expected = sorted(range(num_samples), key=keys.__getitem__)
    assert permutation(seed, epoch, num_samples).tolist() == expected


@settings(deadline=None)
@given(st.data())
def test_every_split_sees_the_same_samples_once(data: st.DataObject) -> None:
    micro = data.draw(st.integers(1, 4), "B")
    replicas = data.draw(st.integers(1, 4), "D")
    microbatches = data.draw(st.integers(1, 4), "M")
    batch = micro * replicas * microbatches
    num_samples = data.draw(st.integers(batch, 5 * batch + 3), "n")
    plan = SamplePlan(num_samples, data.draw(st.integers(0, 9), "seed"), batch)
    start = data.draw(st.integers(0, 3), "k") * plan.steps_per_epoch  # whole epochs
    seen = []
    for step in range(start, start + plan.steps_per_epoch):
        parts = [
            plan.micro_batch(step, m, d, microbatches, replicas)
            for m in range(microbatches)
            for d in range(replicas)
        ]
        assert all(len(part) == micro for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), plan.sample_ids(step))
        seen += np.concatenate(parts).tolist()
    assert len(set(seen)) == len(seen) == num_samples - num_samples % batch
    assert set(seen) <= set(range(num_samples))


def test_two_replicas_interleave_to_one() -> None:
    plan = SamplePlan(100, 3, 24)
    one = [plan.micro_batch(5, m, 0, 6, 1) for m in range(6)]
    two = [plan.micro_batch(5, m, d, 3, 2) for m in range(3) for d in range(2)]
    np.testing.assert_array_equal(np.stack(one), np.stack(two))


def test_locate_and_epochs_differ() -> None:
    plan = SamplePlan(103, 0, 10)
    assert plan.locate(0) == (0, 0)
    assert plan.locate(29) == (2, 9)
    assert not np.array_equal(plan.sample_ids(0), plan.sample_ids(10))


def test_too_few_samples() -> None:
    with pytest.raises(UserError, match=r"global_batch=32: larger than .* 31 images"):
        SamplePlan(31, 0, 32)


def test_imagenet_sized_order_is_equal_in_another_process() -> None:
    code = (
        "import hashlib\n"
        "from deepmim_scale.data.sample_plan import permutation\n"
        "order = permutation(7, 3, 1281167)\n"
        "print(hashlib.sha1(order.tobytes()).hexdigest())\n"
    )
    elsewhere = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    order = permutation(7, 3, 1281167)
    assert hashlib.sha1(order.tobytes()).hexdigest() == elsewhere
    assert np.bincount(order).max() == 1


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1.0), st.integers(0, 2**32 - 1))
def test_crops_lie_inside(height: int, width: int, min_area: float, seed: int) -> None:
    ids = np.arange(8)
    boxes = crops(seed, 0, ids, np.full(8, height), np.full(8, width), min_area)
    top, left, tall, wide = boxes.T
    assert boxes.dtype == np.int32
    assert (boxes[:, :2] >= 0).all(), boxes
    assert (boxes[:, 2:] >= 1).all(), boxes
    assert (top + tall <= height).all(), boxes
    assert (left + wide <= width).all(), boxes


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (300, 900), (40, 400)])
def test_crops_follow_torchvision(height: int, width: int) -> None:
    """Mean and deciles of all four numbers against torchvision's own sampler."""
    count = 6000
    ours = crops(5, 2, np.arange(count), np.full(count, height), np.full(count, width), 0.2)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    deciles = np.linspace(0.1, 0.9, 9)
    for column, name in enumerate(("top", "left", "height", "width")):
        difference = np.quantile(ours[:, column], deciles) - np.quantile(theirs[:, column], deciles)
        assert np.abs(difference).max() <= 0.04 * max(height, width), (name, difference)
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.01 * max(height, width)


def test_fallback_is_torchvisions() -> None:
    """No try fits a strip of 1 x 40: the whole height and 4/3 of it, centered."""
    boxes = crops(0, 0, np.arange(4), np.array([1, 40, 30, 10]), np.array([40, 1, 300, 10]), 1.0)
    assert boxes[0].tolist() == [0, 19, 1, 1]
    assert boxes[1].tolist() == [19, 0, 1, 1]
    assert boxes[2].tolist() == [0, 130, 30, 40]


def test_flips_are_fair_and_repeatable() -> None:
    ids = np.arange(4000)
    mirrored = flips(1, 4, ids)
    assert abs(mirrored.mean() - 0.5) < 0.03
    chosen = np.array(random.Random(0).sample(range(4000), 50))
    np.testing.assert_array_equal(flips(1, 4, chosen), mirrored[chosen])
    assert abs(np.mean(mirrored == flips(1, 5, ids)) - 0.5) < 0.03


def test_replacement_is_the_next_in_order() -> None:
    plan = SamplePlan(10, 0, 5)
    order = permutation(0, 1, 10).tolist()
    assert plan.replacement(2, order[3], 1) == order[4]
    assert plan.replacement(3, order[9], 2) == order[1]
