"""DALI (CPU pipelines) against PIL and against itself: pixels, determinism, bad files."""

import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.backends import build_backend, choose_loader
from deepmim_scale.data.feed import build_feed
from deepmim_scale.data.manifest import open_manifest
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips
from deepmim_scale.data.samples import write_samples
from deepmim_scale.images import normalize
from deepmim_scale.models import build_model, local_backward

pytest.importorskip("nvidia.dali", reason="DALI is an extra: dali-cuda12 or dali-cuda13")

from deepmim_scale.data import dali

SIZE = 48


def plan(root, batch):
    paths = sorted(str(path) for path in root.glob("*.jpg"))
    ids = np.arange(len(paths))
    widths, heights = np.array([Image.open(path).size for path in paths]).T
    boxes, mirrored = crops(0, 0, ids, heights, widths, 0.2), flips(0, 0, ids)
    for first in range(0, len(ids), batch):
        at = slice(first, first + batch)
        yield DecodeRequest(ids[at], paths[at], boxes[at], mirrored[at])


def digests(root, **options):
    """SHA-1 of each micro-batch's images, boxes and flips."""
    return [
        hashlib.sha1(
            images.numpy().tobytes() + rows.boxes.tobytes() + rows.flips.tobytes()
        ).hexdigest()
        for rows, images in dali.stream(plan(root, 25), SIZE, max_batch=25, **options)
    ]


@pytest.fixture(scope="module")
def photos(photographs):
    return photographs


def test_pixels_are_pils(photos):
    found = torch.cat([images for _, images in dali.stream(plan(photos, 32), SIZE, 2, 32)])
    assert found.shape == (200, 3, SIZE, SIZE)
    (rows,) = plan(photos, 200)
    expected = []
    for path, (top, left, height, width), flip in zip(
        rows.paths, rows.boxes.tolist(), rows.flips, strict=True
    ):
        image = Image.open(path).convert("RGB").crop((left, top, left + width, top + height))
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.int64)
        expected.append((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1))
    difference = np.abs(found.numpy() - np.stack(expected))
    assert difference.mean() <= 0.25, difference.mean()
    assert difference.max() <= 10, difference.max()


def test_equal_over_processes_threads_and_prefetch(photos):
    here = digests(photos, threads=1, prefetch=2)
    assert digests(photos, threads=3, prefetch=1) == here
    assert digests(photos, threads=2, prefetch=4) == here
    code = (
        "import importlib.util, json, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('there', {__file__!r})\n"
        "there = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(there)\n"
        f"print(json.dumps(there.digests(pathlib.Path({str(photos)!r}), threads=2)))\n"
    )
    there = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert json.loads(there.splitlines()[-1]) == here


def test_any_start_gives_the_rest(photos):
    def hashes(first):
        rows = itertools.islice(plan(photos, 25), first, None)
        stream = dali.stream(rows, SIZE, 1, 25)
        return [hashlib.sha1(images.numpy().tobytes()).hexdigest() for _, images in stream]

    whole = hashes(0)
    assert len(set(whole)) == 8
    for first in (1, 4, 7, 8):
        assert hashes(first) == whole[first:]


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8" + bytes(200), "half", None])
def test_a_bad_file_is_one_line(photos, tmp_path, data):
    if data == "half":
        data = min(photos.iterdir()).read_bytes()[:1500]
    if data is not None:
        (tmp_path / "bad.jpg").write_bytes(data)
    (good, *_) = plan(photos, 2)
    bad = DecodeRequest(
        good.ids, [good.paths[0], str(tmp_path / "bad.jpg")], good.boxes, good.flips
    )
    stream = dali.stream(iter([good, bad, good]), SIZE, 1, 2)
    assert next(stream)[1].shape == (2, 3, SIZE, SIZE)
    with pytest.raises(BadImage, match=r"^DALI: ") as error:
        next(stream)
    assert "\n" not in str(error.value)
    assert list(stream) == []


def test_chosen_where_asked_for():
    loader, decode, line = choose_loader("dali", "auto", torch.device("cpu"))
    assert (loader, decode) == ("dali", "cpu")
    assert line == "loader dali (asked for): decode cpu, resize on the CPU"


def test_training_reaches_the_same_losses(tmp_path):
    """The sample set through DALI and through the torch backend: curves within 2 %."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert write_samples(tmp_path / "set")
    manifest = open_manifest(tmp_path / "set" / "train")
    model_config = ModelConfig(
        method="mae",
        norm_pix=False,
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=4,
    )
    config = RunConfig(model=model_config, microbatch_size=32)
    curves = {}
    for loader in ("torch", "dali"):
        backend, _ = build_backend(config, manifest, 32, torch.device("cpu"), loader)
        feed = build_feed(
            config,
            manifest,
            SamplePlan(len(manifest), 0, 32),
            replica=0,
            num_replicas=1,
            num_microbatches=1,
            start_step=0,
            num_steps=120,
            backend=backend,
        )
        model = build_model(model_config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for (batch,) in feed:
            out = local_backward(model, normalize(batch.images), noise=batch.noise)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(out.loss))
        curves[loader] = np.array(losses)
    assert curves["torch"][-20:].mean() < 0.8 * curves["torch"][:20].mean(), "it must learn"
    difference = np.abs(curves["dali"] / curves["torch"] - 1)
    print(f"largest difference of a step {difference.max():.4f}, mean {difference.mean():.5f}")
    assert difference.max() <= 0.02, difference.max()
