"""Four stages (gloo processes, one launch) hold the same micro-batches, whoever decoded them."""

import itertools
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data import torch_backend
from deepmim_scale.data.exchange import checksum, received_bytes
from deepmim_scale.data.feed import build_feed
from deepmim_scale.data.manifest import open_manifest
from deepmim_scale.data.sample_plan import SamplePlan

STAGES, BATCH, SIZE, STEPS = 4, 3, 16, 3
MODES = ("rotate", "first", "replicate")
CONFIG = RunConfig(model=ModelConfig(method="mae", img_size=SIZE, patch_size=4), loader_threads=1)


def write_images(root, bad=()):
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(30):
        path = root / f"{i:02}.png"
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:700])


def plan(microbatches):
    return SamplePlan(30, 2, BATCH * microbatches)


def feed(root, group, mode, microbatches, **options):
    return build_feed(
        CONFIG,
        open_manifest(root),
        plan(microbatches),
        replica=0,
        num_replicas=1,
        num_microbatches=microbatches,
        start_step=0,
        num_steps=STEPS,
        group=group,
        mode=mode,
        **options,
    )


def worker(root, stage):
    """One stage: runs every case in turn on the same group and writes what it saw."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(root / "store"), STAGES),
        rank=stage,
        world_size=STAGES,
        timeout=timedelta(seconds=60),
    )
    group = dist.new_group(range(STAGES))

    def seen(name, mode, microbatches, **options):
        stages_feed, steps = feed(root / name, group, mode, microbatches, **options), []
        try:
            for batches in stages_feed:
                steps.append(
                    [[checksum(b.images, b.noise), b.sample_ids.tolist()] for b in batches]
                )
            error = None
        except (ValueError, RuntimeError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        return {"steps": steps, "bytes": stages_feed.received_bytes, "error": error}

    def altered(jobs):
        """Stage 2 sees one wrong pixel in the third step's second micro-batch."""
        decoded = torch_backend.stream(jobs, SIZE, 1)
        for number, (rows, images) in enumerate(decoded):
            if stage == 2 and number == 2 * 4 + 1:
                images[1, 0, 5, 5] ^= 1
            yield rows, images

    cases = {
        f"{mode} {microbatches}": seen("good", mode, microbatches)
        for mode, microbatches in itertools.product(MODES, (3, 4, 8))
    }
    cases |= {f"checked {mode}": seen("good", mode, 4, check_feed=1) for mode in MODES}
    cases["mismatch"] = seen("good", "replicate", 4, check_feed=2, backend=altered)
    cases["unchecked"] = seen("good", "replicate", 4, check_feed=0, backend=altered)
    for mode in MODES:
        cases[f"fail {mode}"] = seen("bad", mode, 4, on_bad="fail")
        cases[f"replace {mode}"] = seen("bad", mode, 4, on_bad="replace")
    (root / f"{stage}.json").write_text(json.dumps(cases))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What the four stages saw: a list of {case: {steps, bytes, error}}."""
    root = tmp_path_factory.mktemp("stages")
    write_images(root / "good")
    # One bad file in each of the first two steps, decoded by different stages under `rotate`.
    bad = [plan(4).micro_batch(0, 1, 0, 4, 1)[0], plan(4).micro_batch(1, 3, 0, 4, 1)[2]]
    write_images(root / "bad", bad=bad)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(root)]
    processes = [
        subprocess.Popen([*command, str(stage)], env=environment, stderr=subprocess.PIPE, text=True)
        for stage in range(STAGES)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [json.loads((root / f"{stage}.json").read_text()) for stage in range(STAGES)]


@pytest.mark.parametrize("microbatches", [3, 4, 8])
def test_all_modes_and_stages_agree_with_the_plan(stages, microbatches):
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
def test_bytes_equal_the_formula(stages, mode, microbatches):
    for stage in range(STAGES):
        formula = received_bytes(mode, microbatches, stage, STAGES, BATCH, SIZE)
        assert stages[stage][f"{mode} {microbatches}"]["bytes"] == STEPS * formula, stage


def test_check_passes_and_finds(stages):
    for stage in range(STAGES):
        assert all(stages[stage][f"checked {mode}"]["error"] is None for mode in MODES)
        assert stages[stage]["unchecked"]["error"] is None
        error = stages[stage]["mismatch"]["error"]
        assert error.startswith("FeedMismatch: step 2, micro-batch 1: stages [2] hold other data")
        assert len(stages[stage]["mismatch"]["steps"]) == 2


@pytest.mark.parametrize(("mode", "culprit"), [("rotate", 1), ("first", 0)])
def test_a_bad_file_stops_every_stage(stages, mode, culprit):
    for stage in range(STAGES):
        error = stages[stage][f"fail {mode}"]["error"]
        if stage == culprit:
            assert error.startswith("BadImage: step 0: ")
            assert "data verify" in error
        else:
            assert error.startswith(f"PeerFailed: stages [{culprit}] could not decode")
    assert all("BadImage" in stages[s]["fail replicate"]["error"] for s in range(STAGES))


def test_replacement_is_the_same_everywhere(stages):
    expected = stages[0]["replace replicate"]["steps"]
    assert len(expected) == STEPS
    assert expected != stages[0]["replicate 4"]["steps"]
    for mode in MODES:
        for stage in range(STAGES):
            result = stages[stage][f"replace {mode}"]
            assert (result["error"], result["steps"]) == (None, expected), (mode, stage)


def test_checksums_tell_tensors_apart():
    ones = torch.ones(2, 3, dtype=torch.uint8)
    assert checksum(ones) != checksum(ones, ones)
    assert checksum(torch.arange(6)) != checksum(torch.arange(6).flip(0))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
