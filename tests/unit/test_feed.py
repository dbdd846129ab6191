"""The feed of one process: equals the plan, resumes anywhere, closes, survives bad files."""

import functools
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data import backends, torch_backend
from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.exchange import own_microbatches, received_bytes
from deepmim_scale.data.feed import StepLoader, build_feed, iter_validation
from deepmim_scale.data.manifest import open_manifest
from deepmim_scale.data.masks import mask_noise
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips, permutation

CONFIG = RunConfig(
    model=ModelConfig(
        method="mae",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    microbatch_size=3,
    loader_threads=2,
)


def write_images(root, count=26):
    generator = np.random.default_rng(0)
    (root / "a").mkdir(parents=True)
    for i in range(count):
        pixels = generator.integers(0, 255, (20 + i % 5, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "a" / f"{i:02}.png")
    return open_manifest(root)


@pytest.fixture
def manifest(tmp_path):
    return write_images(tmp_path)


def make(manifest, *, start=0, steps=6, replica=0, replicas=1, microbatches=4, **options):
    return build_feed(
        CONFIG,
        manifest,
        SamplePlan(len(manifest), 5, 12),
        replica=replica,
        num_replicas=replicas,
        num_microbatches=microbatches,
        start_step=start,
        num_steps=steps,
        **options,
    )


def flat(steps):
    """All tensors of all batches, for comparison."""
    return [(batch.images, batch.noise, batch.sample_ids) for batches in steps for batch in batches]


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_batches_are_the_plans(manifest):
    plan = SamplePlan(len(manifest), 5, 12)
    steps = list(make(manifest))
    assert len(steps) == 6
    for step, batches in enumerate(steps):
        epoch, _ = plan.locate(step)
        for m, batch in enumerate(batches):
            ids = plan.micro_batch(step, m, 0, 4, 1)
            boxes = crops(5, epoch, ids, manifest.heights[ids], manifest.widths[ids], 0.2)
            rows = DecodeRequest(ids, [manifest.paths[i] for i in ids], boxes, flips(5, epoch, ids))
            assert batch.sample_ids.tolist() == ids.tolist()
            assert torch.equal(batch.images, torch_backend.start(rows, 16, 1)())
            np.testing.assert_array_equal(batch.noise.numpy(), mask_noise(5, epoch, ids, 16))
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.dtype == torch.uint8


def test_resume_and_splits_see_the_same(manifest):
    whole = flat(make(manifest))
    for start in (1, 3, 5, 6):
        assert_equal(flat(make(manifest, start=start, steps=6 - start)), whole[4 * start :])
    halves = [list(make(manifest, replica=d, replicas=2, microbatches=2)) for d in range(2)]
    together = [[halves[d][step][m] for m in range(2) for d in range(2)] for step in range(6)]
    assert_equal(flat(together), whole)


def test_cache_and_prefetch_change_nothing(manifest, monkeypatch):
    whole = flat(make(manifest))
    monkeypatch.setattr(backends, "CACHE_BYTES", 0)
    assert_equal(flat(make(manifest)), whole)
    for prefetch in (1, 3):
        backend = functools.partial(torch_backend.stream, size=16, threads=1, prefetch=prefetch)
        assert_equal(flat(make(manifest, backend=backend)), whole)


def test_next_step_is_made_while_this_one_is_used():
    made = []

    def load(step):
        time.sleep(0.2)
        made.append(step)
        return []

    feed = StepLoader(load, 3, 4)
    iterator = iter(feed)
    next(iterator)
    assert feed.wait_seconds > 0.15
    deadline = time.monotonic() + 10
    while made != [3, 4] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [3, 4], "one step ahead, no more"
    next(iterator)
    assert feed.wait_seconds < 0.1
    iterator.close()


def feed_threads():
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt, None])
def test_thread_ends_however_the_loop_ends(manifest, end):
    def loop():
        for _ in make(manifest):
            if end:
                raise end

    if end:
        with pytest.raises(end):
            loop()
    else:
        loop()
    deadline = time.monotonic() + 2
    while feed_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not feed_threads()


def test_errors_of_the_thread_reach_the_trainer():
    def load(step):
        raise OSError(f"disk gone at {step}")

    with pytest.raises(OSError, match="disk gone at 2"):
        list(StepLoader(load, 2, 1))
    assert list(StepLoader(load, 2, 0)) == []


def spoil(manifest, *places):
    for place in places:
        path = manifest.paths[place]
        with open(path, "rb+") as file:
            file.truncate(len(file.read()) // 2)


def test_a_bad_file_fails_by_name_or_is_replaced(manifest, capsys):
    order = permutation(5, 0, 26).tolist()
    spoil(manifest, order[1], order[2], order[23])
    with pytest.raises(BadImage, match=rf"step 0: .*/{order[1]:02}\.png: .*data verify") as error:
        list(make(manifest))
    assert "\n" not in str(error.value)
    feed = make(manifest, on_bad="replace")
    steps = list(feed)
    ids = torch.cat([batch.sample_ids for batches in steps[:2] for batch in batches]).tolist()
    expected = order[:24]
    expected[1] = expected[2] = order[3]
    expected[23] = order[24]
    assert ids == expected
    assert capsys.readouterr().err.count("the next sample replaces it") == 3
    assert_equal(flat(make(manifest, on_bad="replace", start=1, steps=5)), flat(steps[1:]))


def test_when_nothing_can_be_read(manifest):
    spoil(manifest, *range(26))
    with pytest.raises(BadImage, match="no image can be decoded"):
        list(make(manifest, on_bad="replace"))


def test_a_fault_of_the_backend_is_no_bad_file(manifest):
    def broken(jobs):
        for rows in jobs:
            if len(rows.ids) > 1:
                raise BadImage("out of memory")
            yield rows, torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

    with pytest.raises(BadImage, match=r"^out of memory$"):
        list(make(manifest, backend=broken, on_bad="replace"))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_validation_sees_every_image_once(manifest, replicas):
    batches = [
        batch
        for replica in range(replicas)
        for batch in iter_validation(CONFIG, manifest, replica=replica, num_replicas=replicas)
    ]
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert sorted(ids.tolist()) == list(range(26))
    noise = torch.cat([batch.noise for batch in batches])[ids.argsort()].numpy()
    one = list(iter_validation(CONFIG, manifest, replica=0, num_replicas=1))
    np.testing.assert_array_equal(noise, torch.cat([batch.noise for batch in one]).numpy())
    assert not np.array_equal(noise, mask_noise(0, 0, np.arange(26), 16))
    assert len(one[-1].sample_ids) == 2


def test_bad_held_out_images_fail_or_are_named(manifest, capsys):
    spoil(manifest, 4)
    with pytest.raises(BadImage, match=r"04\.png"):
        list(iter_validation(CONFIG, manifest, replica=0, num_replicas=1))
    batches = iter_validation(CONFIG, manifest, replica=0, num_replicas=1, on_bad="replace")
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert ids == [i for i in range(26) if i != 4]
    assert "validation image left out: " in capsys.readouterr().err


@pytest.mark.parametrize("microbatches", [1, 4, 7])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_microbatch_is_decoded_by_one_stage(microbatches, stages):
    for mode, copies in (("rotate", 1), ("first", 1), ("replicate", stages)):
        own = [own_microbatches(mode, microbatches, stage, stages) for stage in range(stages)]
        everything = sorted(m for part in own for m in part)
        assert everything == sorted(list(range(microbatches)) * copies), mode


def test_bytes_of_the_notes():
    """128 images of 224 pixels: 14.5 MB per rank and micro-batch with 4 stages, 16.9 with 8."""
    assert received_bytes("rotate", 4, 1, 4, 128, 224) / 4e6 == pytest.approx(14.45, abs=0.01)
    assert received_bytes("rotate", 8, 1, 8, 128, 224) / 8e6 == pytest.approx(16.86, abs=0.01)
    assert received_bytes("first", 8, 0, 4, 128, 224) == 0
    assert received_bytes("replicate", 8, 3, 4, 128, 224) == 0


@given(st.data())
def test_stages_and_restarts_share_one_plan(data):
    """Whatever (n, B, M, D, P, mode, k): from step k on, the stages decode the plan, no more."""
    draw = {key: data.draw(st.integers(1, 4), key) for key in "BMDP"}
    micro, count, replicas, stages = draw.values()
    mode = data.draw(st.sampled_from(["rotate", "first", "replicate"]), "mode")
    samples = data.draw(st.integers(micro * count * replicas, 200), "n")
    whole = SamplePlan(samples, data.draw(st.integers(0, 5), "seed"), micro * count * replicas)
    again = SamplePlan(samples, whole.seed, whole.global_batch)  # as a restarted process has it
    first = data.draw(st.integers(0, 40), "k")
    for step in range(first, first + 3):
        seen = []
        for replica in range(replicas):
            decoded = [
                (m, again.micro_batch(step, m, replica, count, replicas).tolist())
                for stage in range(stages)
                for m in own_microbatches(mode, count, stage, stages)
            ]
            copies = stages if mode == "replicate" else 1
            assert len(decoded) == count * copies
            by_number = dict(decoded)
            assert sorted(by_number) == list(range(count))
            seen += [(m * replicas + replica, ids) for m, ids in by_number.items()]
        everything = [i for _, ids in sorted(seen) for i in ids]
        assert everything == whole.sample_ids(step).tolist()
