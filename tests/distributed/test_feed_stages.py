"""Four stages (gloo processes, one launch) hold the same micro-batches, whoever decoded them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from deepmim_scale.batch import Batch
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data import torch_backend
from deepmim_scale.data.backend import DecodeRequest
from deepmim_scale.data.folder_source import open_folder
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.stage_exchange import FeedMode, checksum, received_bytes
from deepmim_scale.data.step_loader import (
    FeedOptions,
    Share,
    Span,
    StepLoader,
    build_step_loader,
)
from deepmim_scale.image_format import ImageFormat

STAGES, BATCH, SIZE, STEPS = 4, 3, 16, 3
MODES: list[FeedMode] = ["rotate", "first", "replicate"]
CONFIG = RunConfig(model=ModelConfig(method="mae", img_size=SIZE, patch_size=4), loader_threads=1)


def write_images(root: Path, bad: Collection[int] = ()) -> None:
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(30):
        path = root / f"{i:02}.png"
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:700])


def plan(microbatches: int) -> SamplePlan:
    return SamplePlan(30, 2, BATCH * microbatches)


def make(
    root: Path,
    group: dist.ProcessGroup | None,
    microbatches: int,
    options: FeedOptions,
    **others: Any,
) -> StepLoader:
    share = Share(num_microbatches=microbatches)
    return build_step_loader(
        CONFIG,
        open_folder(root),
        plan(microbatches),
        share,
        Span(0, STEPS),
        options,
        group=group,
        **others,
    )


def ids_of(batch: Batch) -> list[int]:
    return batch.tensors()["sample_ids"].tolist()


def worker(root: Path, stage: int) -> None:
    """One stage: runs every case in turn on the same group and writes what it saw."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(root / "store"), STAGES),
        rank=stage,
        world_size=STAGES,
        timeout=timedelta(seconds=300),
    )
    group = dist.new_group(range(STAGES))
    assert isinstance(group, dist.ProcessGroup), "every process is a stage"
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[stage // 2]
    assert isinstance(pair, dist.ProcessGroup), "every process has a pair"

    def seen(
        name: str,
        microbatches: int,
        options: FeedOptions,
        group: dist.ProcessGroup | None = group,
        **others: Any,
    ) -> dict[str, Any]:
        loader = make(root / name, group, microbatches, options, **others)
        steps: list[Any] = []
        error = None
        try:
            for batches in loader:
                steps.append(  # noqa: PERF401 - steps before an error count
                    [
                        [checksum(b.images, b.noise, b.tensors()["labels"]), ids_of(b)]
                        for b in batches
                    ]
                )
        except (ValueError, RuntimeError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        return {"steps": steps, "bytes": loader.received_bytes, "error": error}

    def altered(
        requests: Iterator[DecodeRequest],
    ) -> Iterator[tuple[DecodeRequest, torch.Tensor]]:
        """Stage 2 sees one wrong pixel in the third step's second micro-batch."""
        read_image = torch_backend.image_reader(open_folder(root / "good"))
        decoded = torch_backend.stream(requests, read_image, ImageFormat(3, SIZE, SIZE), 1)
        for number, (request, images) in enumerate(decoded):
            if stage == 2 and number == 2 * 4 + 1:
                images[1, 0, 5, 5] ^= 1
            yield request, images

    cases = {
        f"{mode} {microbatches}": seen("good", microbatches, FeedOptions(mode))
        for mode, microbatches in itertools.product(MODES, (3, 4, 8))
    }
    cases |= {
        f"checked {mode}": seen("good", 4, FeedOptions(mode, check_every=1)) for mode in MODES
    }
    cases["mismatch"] = seen("good", 4, FeedOptions("replicate", check_every=2), backend=altered)
    cases["unchecked"] = seen("good", 4, FeedOptions("replicate"), backend=altered)
    for mode in MODES:
        cases[f"fail {mode}"] = seen("bad", 4, FeedOptions(mode))
        cases[f"replace {mode}"] = seen("bad", 4, FeedOptions(mode, on_bad="replace"))
        cases[f"quarantine {mode}"] = seen("quarantined", 4, FeedOptions(mode))
        cases[f"two stages {mode}"] = seen("quarantined", 4, FeedOptions(mode), pair)
    cases["one stage replicate"] = seen("quarantined", 4, FeedOptions(), None)
    (root / f"{stage}.json").write_text(json.dumps(cases))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the four stages saw: a list of {case: {steps, bytes, error}}."""
    root = tmp_path_factory.mktemp("stages")
    write_images(root / "good")
    # One bad file in each of the first two steps, decoded by different stages under `rotate`.
    bad = [plan(4).micro_batch(0, 1, 0, 4, 1)[0], plan(4).micro_batch(1, 3, 0, 4, 1)[2]]
    write_images(root / "bad", bad=bad)
    write_images(root / "quarantined")
    quarantine = "".join(f"{i:02}.png\tdamaged\n" for i in bad)
    (root / "quarantined" / "quarantine.txt").write_text(quarantine)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(root)]
    processes = [
        subprocess.Popen([*command, str(stage)], env=environment, stderr=subprocess.PIPE, text=True)
        for stage in range(STAGES)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [json.loads((root / f"{stage}.json").read_text()) for stage in range(STAGES)]


@pytest.mark.parametrize("microbatches", [3, 4, 8])
def test_all_modes_and_stages_agree_with_the_plan(
    stages: list[dict[str, Any]], microbatches: int
) -> None:
    expected = stages[0][f"replicate {microbatches}"]["steps"]
    assert len(expected) == STEPS
    for mode in MODES:
        for stage in range(STAGES):
            result = stages[stage][f"{mode} {microbatches}"]
            assert result["error"] is None
            assert result["steps"] == expected, (mode, stage)
    for step in range(STEPS):
        ids = [i for _, batch_ids in expected[step] for i in batch_ids]
        assert ids == plan(microbatches).sample_ids(step).tolist()


@pytest.mark.parametrize("microbatches", [3, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_equal_the_formula(
    stages: list[dict[str, Any]], mode: FeedMode, microbatches: int
) -> None:
    for stage in range(STAGES):
        formula = received_bytes(mode, microbatches, stage, STAGES, BATCH, 3 * SIZE * SIZE)
        assert stages[stage][f"{mode} {microbatches}"]["bytes"] == STEPS * formula, stage


def test_check_passes_and_finds(stages: list[dict[str, Any]]) -> None:
    for stage in range(STAGES):
        assert all(stages[stage][f"checked {mode}"]["error"] is None for mode in MODES)
        assert stages[stage]["unchecked"]["error"] is None
        error = stages[stage]["mismatch"]["error"]
        assert error.startswith("FeedMismatch: step 2, micro-batch 1: stages [2] hold other data")
        assert len(stages[stage]["mismatch"]["steps"]) == 2


@pytest.mark.parametrize(("mode", "culprit"), [("rotate", 1), ("first", 0)])
def test_a_bad_file_stops_every_stage(
    stages: list[dict[str, Any]], mode: FeedMode, culprit: int
) -> None:
    for stage in range(STAGES):
        error = stages[stage][f"fail {mode}"]["error"]
        if stage == culprit:
            assert error.startswith("BadImage: step 0: ")
            assert "data verify" in error
        else:
            assert error.startswith(f"PeerFailed: stages [{culprit}] could not decode")
    assert all("BadImage" in stages[s]["fail replicate"]["error"] for s in range(STAGES))


def test_replacement_is_the_same_everywhere(stages: list[dict[str, Any]]) -> None:
    expected = stages[0]["replace replicate"]["steps"]
    assert len(expected) == STEPS
    assert expected != stages[0]["replicate 4"]["steps"]
    cases = itertools.product(("replace", "quarantine", "two stages"), MODES)
    for why, mode in [*cases, ("one stage", "replicate")]:
        for stage in range(STAGES):
            result = stages[stage][f"{why} {mode}"]
            assert (result["error"], result["steps"]) == (None, expected), (why, mode, stage)


def test_checksums_tell_tensors_apart() -> None:
    ones = torch.ones(2, 3, dtype=torch.uint8)
    assert checksum(ones) != checksum(ones, ones)
    assert checksum(torch.arange(6)) != checksum(torch.arange(6).flip(0))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
