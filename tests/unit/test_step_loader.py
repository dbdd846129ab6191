"""The batches of one process: the plan's, from any step on, and other files only for bad ones."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepmim_scale.batch import Batch
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data import torch_backend
from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.folder_source import FolderSource, open_folder
from deepmim_scale.data.masks import mask_noise
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips, permutation
from deepmim_scale.data.stage_exchange import FeedMode, own_microbatches, received_bytes
from deepmim_scale.data.step_loader import (
    FeedOptions,
    Share,
    Span,
    StepLoader,
    build_step_loader,
    iter_validation,
)
from deepmim_scale.errors import RunFailure
from deepmim_scale.image_format import ImageFormat

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


def write_images(root: Path, count: int = 26) -> FolderSource:
    """Images of three classes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 255, (20 + i % 5, 30, 3), dtype=np.uint8)
        folder = root / "abc"[3 * i // count]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return open_folder(root)


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    return write_images(tmp_path)


WHOLE = Share(num_microbatches=4)
FAIL, REPLACE = FeedOptions(), FeedOptions(on_bad="replace")


def make(
    source: FolderSource,
    *,
    start: int = 0,
    steps: int = 6,
    share: Share = WHOLE,
    options: FeedOptions = FAIL,
    **others: Any,
) -> StepLoader:
    plan = SamplePlan(len(source), 5, 12)
    return build_step_loader(CONFIG, source, plan, share, Span(start, steps), options, **others)


def flat(steps: Iterable[list[Batch]]) -> list[dict[str, torch.Tensor]]:
    """All tensors of all batches, for comparison."""
    return [batch.tensors() for batches in steps for batch in batches]


def assert_equal(
    first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]
) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert list(one) == list(two) == ["images", "noise", "sample_ids", "labels"]
        assert all(torch.equal(one[name], two[name]) for name in one)


def all_ids(batches: Iterable[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.tensors()["sample_ids"].tolist()]


def test_batches_are_the_plans(source: FolderSource) -> None:
    plan = SamplePlan(len(source), 5, 12)
    steps = list(make(source))
    read_image = torch_backend.image_reader(source)
    assert len(steps) == 6
    for step, batches in enumerate(steps):
        epoch, _ = plan.locate(step)
        for m, batch in enumerate(batches):
            ids = plan.micro_batch(step, m, 0, 4, 1)
            heights, widths = source.sizes[ids].T
            boxes = crops(5, epoch, ids, heights, widths, 0.2)
            request = DecodeRequest(ids, boxes, flips(5, epoch, ids))
            assert all_ids([batch]) == ids.tolist()
            assert torch.equal(
                batch.images, torch_backend.start(request, read_image, ImageFormat(3, 16, 16), 1)()
            )
            assert batch.labels is not None
            assert batch.labels.dtype == torch.int64
            assert batch.labels.tolist() == [3 * i // 26 for i in ids]
            np.testing.assert_array_equal(batch.noise.numpy(), mask_noise(5, epoch, ids, 16))
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.dtype == torch.uint8


def test_resume_and_splits_see_the_same(source: FolderSource) -> None:
    whole = flat(make(source))
    for start in (1, 3, 5, 6):
        assert_equal(flat(make(source, start=start, steps=6 - start)), whole[4 * start :])
    halves = [list(make(source, share=Share(d, 2, 2))) for d in range(2)]
    together = [[halves[d][step][m] for m in range(2) for d in range(2)] for step in range(6)]
    assert_equal(flat(together), whole)


def test_cache_and_prefetch_change_nothing(
    source: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = flat(make(source))
    monkeypatch.setattr(torch_backend, "CACHE_BYTES", 0)
    assert_equal(flat(make(source)), whole)
    for prefetch in (1, 3):
        backend = functools.partial(
            torch_backend.stream,
            read_image=torch_backend.image_reader(source),
            image=ImageFormat(3, 16, 16),
            threads=1,
            prefetch=prefetch,
        )
        assert_equal(flat(make(source, backend=backend)), whole)


def test_small_sets_are_read_once_and_by_the_decoding_threads(
    source: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    threads: set[str] = set()

    def counting(self: FolderSource, sample_id: int) -> bytes:
        reads.append(sample_id)
        threads.add(threading.current_thread().name.split("_")[0])
        return read(self, sample_id)

    read = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", counting)
    list(make(source))
    assert len(reads) == len(set(reads)) == 26
    assert threads == {"decode"}
    monkeypatch.setattr(torch_backend, "CACHE_BYTES", 0)
    list(make(source))
    assert len(reads) == 26 + 6 * 12


def test_next_step_is_made_while_this_one_is_used() -> None:
    made: list[int] = []

    def load(step: int) -> list[Batch]:
        time.sleep(0.2)
        made.append(step)
        return []

    loader = StepLoader(load, Span(3, 4))
    iterator = loader.__iter__()
    next(iterator)
    assert loader.wait_seconds > 0
    deadline = time.monotonic() + 300
    while made != [3, 4] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [3, 4], "one step ahead, no more"
    next(iterator)
    loader.close()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt, None])
def test_thread_ends_however_the_loop_ends(
    source: FolderSource, end: type[BaseException] | None
) -> None:
    def loop() -> None:
        for _ in make(source):
            if end:
                raise end

    if end:
        with pytest.raises(end):
            loop()
    else:
        loop()
    deadline = time.monotonic() + 300
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


def test_errors_of_the_thread_reach_the_trainer() -> None:
    def load(step: int) -> list[Batch]:
        raise OSError(f"disk gone at {step}")

    with pytest.raises(OSError, match="disk gone at 2"):
        list(StepLoader(load, Span(2, 1)))
    assert list(StepLoader(load, Span(2, 0))) == []


def spoil(source: FolderSource, *ids: int) -> None:
    for sample_id in ids:
        with open(source.name(sample_id), "rb+") as file:
            file.truncate(len(file.read()) // 2)


def test_a_bad_file_fails_by_name_or_is_replaced(
    source: FolderSource, capsys: pytest.CaptureFixture[str]
) -> None:
    order = permutation(5, 0, 26).tolist()
    spoil(source, order[1], order[2], order[23])
    with pytest.raises(BadImage, match=rf"step 0: .*/{order[1]:02}\.png: .*data verify") as error:
        list(make(source))
    assert isinstance(error.value, RunFailure)
    assert "\n" not in str(error.value)
    steps = list(make(source, options=REPLACE))
    ids = all_ids(batch for batches in steps[:2] for batch in batches)
    expected = order[:24]
    expected[1] = expected[2] = order[3]
    expected[23] = order[24]
    assert ids == expected
    assert capsys.readouterr().err.count("the next sample replaces it") == 3
    for batch in (batch for batches in steps for batch in batches):
        labels = batch.tensors()["labels"].tolist()
        assert labels == [3 * i // 26 for i in all_ids([batch])], "the replacement's label"
    assert_equal(flat(make(source, options=REPLACE, start=1, steps=5)), flat(steps[1:]))


def test_when_nothing_can_be_read(source: FolderSource) -> None:
    spoil(source, *range(26))
    with pytest.raises(BadImage, match="no image can be decoded"):
        list(make(source, options=REPLACE))


def test_a_fault_of_the_backend_is_no_bad_file(source: FolderSource) -> None:
    def broken(
        requests: Iterator[DecodeRequest],
    ) -> Iterator[tuple[DecodeRequest, torch.Tensor]]:
        for request in requests:
            if len(request.ids) > 1:
                raise BadImage("out of memory")
            yield request, torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

    with pytest.raises(BadImage, match=r"^out of memory$"):
        list(make(source, backend=broken, options=REPLACE))


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_validation_sees_every_image_once(source: FolderSource, num_replicas: int) -> None:
    batches = [
        batch
        for dp_rank in range(num_replicas)
        for batch in iter_validation(CONFIG, source, dp_rank=dp_rank, num_replicas=num_replicas)
    ]
    ids = torch.cat([batch.tensors()["sample_ids"] for batch in batches])
    assert sorted(ids.tolist()) == list(range(26))
    labels = torch.cat([batch.tensors()["labels"] for batch in batches])
    assert labels.tolist() == [3 * i // 26 for i in ids.tolist()]
    noise = torch.cat([batch.noise for batch in batches])[ids.argsort()].numpy()
    one = list(iter_validation(CONFIG, source))
    np.testing.assert_array_equal(noise, torch.cat([batch.noise for batch in one]).numpy())
    assert not np.array_equal(noise, mask_noise(0, 0, np.arange(26), 16))
    assert len(one[-1].images) == 2


def test_bad_held_out_images_fail_or_are_named(
    source: FolderSource, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(source, 4)
    with pytest.raises(BadImage, match=r"04\.png"):
        list(iter_validation(CONFIG, source))
    batches = iter_validation(CONFIG, source, on_bad="replace")
    assert all_ids(batches) == [i for i in range(26) if i != 4]
    assert "validation image left out: " in capsys.readouterr().err


# Which files are bad must not change which samples there are, nor their order.


def quarantine(
    source: FolderSource, *ids: int, reason: str = "damaged: for a test"
) -> FolderSource:
    root = Path(source.location)
    lines = [f"{source.manifest.names[i]}\t{reason}\n" for i in ids]
    (root / "quarantine.txt").write_text("".join(lines))
    return open_folder(root)


def test_quarantine_replaces_its_samples_and_changes_no_other(
    source: FolderSource, capsys: pytest.CaptureFixture[str]
) -> None:
    order = permutation(5, 0, 26).tolist()
    chosen = (order[1], order[2], order[23])
    whole = flat(make(source))
    without = quarantine(source, *chosen)
    assert (without.sha, len(without)) == (source.sha, 26)
    assert without.notes[-1].startswith("3 quarantined images are not used (")
    found = flat(make(without))
    assert capsys.readouterr().err == "", "known files are counted in the note"
    num_replaced = 0
    for before, after in zip(whole, found, strict=True):
        same = before["sample_ids"] == after["sample_ids"]
        assert [int(i) in chosen for i in before["sample_ids"]] == (~same).tolist()
        for name in before:
            assert torch.equal(before[name][same], after[name][same])
        num_replaced += int((~same).sum())
        assert not set(after["sample_ids"].tolist()) & set(chosen)
    assert num_replaced >= 6, "three epochs"
    assert [found[0]["sample_ids"].tolist()] == [[order[0], order[3], order[3]]]
    # From any step on, as a run that goes on after the quarantine sees it.
    for start in (1, 3, 5):
        assert_equal(flat(make(without, start=start, steps=6 - start)), found[4 * start :])
    # A file that fails to decode is replaced by the same sample.
    (Path(source.location) / "quarantine.txt").unlink()
    spoil(source, *chosen)
    assert_equal(flat(make(open_folder(source.location), options=REPLACE)), found)


def test_unreadable_headers_keep_their_ids(source: FolderSource) -> None:
    order = permutation(5, 0, 26).tolist()
    expected = flat(make(quarantine(source, order[0])))
    (Path(source.location) / "quarantine.txt").unlink()
    Path(source.name(order[0])).write_bytes(b"")
    found = open_folder(source.location, on_bad="replace")
    assert list(found.bad) == [order[0]]
    assert found.sizes[order[0]].tolist() == [0, 0]
    assert_equal(flat(make(found, options=REPLACE)), expected)


def test_a_new_bad_file_stops_although_others_are_quarantined(source: FolderSource) -> None:
    order = permutation(5, 0, 26).tolist()
    without = quarantine(source, order[0])
    spoil(source, order[1])
    with pytest.raises(BadImage, match=rf"step 0: .*/{order[1]:02}\.png: "):
        list(make(without))


def test_validation_leaves_quarantined_images_out(source: FolderSource) -> None:
    without = quarantine(source, 0, 7, 25)
    for num_replicas in (1, 2):
        batches = [
            batch
            for dp_rank in range(num_replicas)
            for batch in iter_validation(
                CONFIG, without, dp_rank=dp_rank, num_replicas=num_replicas
            )
        ]
        assert sorted(all_ids(batches)) == [i for i in range(26) if i not in (0, 7, 25)]
    ids = np.array([3, 9, 11, 20])
    assert all_ids(iter_validation(CONFIG, without, ids=ids)) == ids.tolist()


@pytest.mark.parametrize("microbatches", [1, 4, 7])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_microbatch_is_decoded_by_one_stage(microbatches: int, stages: int) -> None:
    copies_of: dict[FeedMode, int] = {"rotate": 1, "first": 1, "replicate": stages}
    for mode, copies in copies_of.items():
        own = [own_microbatches(mode, microbatches, stage, stages) for stage in range(stages)]
        everything = sorted(m for part in own for m in part)
        assert everything == sorted(list(range(microbatches)) * copies), mode


def test_bytes_of_the_notes() -> None:
    """128 images of 224 pixels: 14.5 MB per rank and micro-batch with 4 stages, 16.9 with 8."""
    assert received_bytes("rotate", 4, 1, 4, 128, 3 * 224 * 224) / 4e6 == pytest.approx(
        14.45, abs=0.01
    )
    assert received_bytes("rotate", 8, 1, 8, 128, 3 * 224 * 224) / 8e6 == pytest.approx(
        16.86, abs=0.01
    )
    assert received_bytes("first", 8, 0, 4, 128, 3 * 224 * 224) == 0
    assert received_bytes("replicate", 8, 3, 4, 128, 3 * 224 * 224) == 0


@given(st.data())
def test_stages_and_restarts_share_one_plan(data: st.DataObject) -> None:
    """Whatever (n, B, M, D, P, mode, k): from step k on, the stages decode the plan, no more."""
    draw = {key: data.draw(st.integers(1, 4), key) for key in "BMDP"}
    micro, count, replicas, stages = draw.values()
    mode: FeedMode = data.draw(st.sampled_from(["rotate", "first", "replicate"]), "mode")
    samples = data.draw(st.integers(micro * count * replicas, 200), "n")
    whole = SamplePlan(samples, data.draw(st.integers(0, 5), "seed"), micro * count * replicas)
    again = SamplePlan(samples, whole.seed, whole.global_batch)  # as a restarted process has it
    first = data.draw(st.integers(0, 40), "k")
    for step in range(first, first + 3):
        seen: list[tuple[int, list[int]]] = []
        for dp_rank in range(replicas):
            decoded = [
                (m, again.micro_batch(step, m, dp_rank, count, replicas).tolist())
                for stage in range(stages)
                for m in own_microbatches(mode, count, stage, stages)
            ]
            copies = stages if mode == "replicate" else 1
            assert len(decoded) == count * copies
            by_number = dict(decoded)
            assert sorted(by_number) == list(range(count))
            seen += [(m * replicas + dp_rank, ids) for m, ids in by_number.items()]
        everything = [i for _, ids in sorted(seen) for i in ids]
        assert everything == whole.sample_ids(step).tolist()
