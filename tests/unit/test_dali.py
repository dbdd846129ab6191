"""DALI (CPU pipelines) against PIL and against itself: pixels, determinism, bad files."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data.backend import BadImage, DecodeRequest
from deepmim_scale.data.choose_backend import build_backend, choose_loader
from deepmim_scale.data.folder_source import FolderSource, open_folder
from deepmim_scale.data.sample_plan import SamplePlan, crops, flips
from deepmim_scale.data.samples import write_samples
from deepmim_scale.data.source import Source
from deepmim_scale.data.step_loader import Share, Span, build_step_loader
from deepmim_scale.images import normalize
from deepmim_scale.models import build_model, local_backward

pytest.importorskip("nvidia.dali", reason="DALI is an extra: dali-cuda12 or dali-cuda13")

from deepmim_scale.data import dali

SIZE = 48


def plan(source: Source, batch: int) -> Iterator[DecodeRequest]:
    ids = np.arange(len(source))
    heights, widths = source.sizes.T
    boxes, mirrored = crops(0, 0, ids, heights, widths, 0.2), flips(0, 0, ids)
    for first in range(0, len(ids), batch):
        at = slice(first, first + batch)
        yield DecodeRequest(ids[at], boxes[at], mirrored[at])


def digests(source: Source, **options: Any) -> list[str]:
    """SHA-1 of each micro-batch's images, boxes and flips."""
    return [
        hashlib.sha1(
            images.numpy().tobytes() + rows.boxes.tobytes() + rows.flips.tobytes()
        ).hexdigest()
        for rows, images in dali.stream(
            plan(source, 25), source, (SIZE, SIZE), max_batch=25, **options
        )
    ]


@pytest.fixture(scope="module")
def photos(photographs: Path) -> FolderSource:
    return open_folder(photographs)


def test_pixels_are_pils(photos: FolderSource) -> None:
    found = torch.cat(
        [images for _, images in dali.stream(plan(photos, 32), photos, (SIZE, SIZE), 2, 32)]
    )
    assert found.shape == (200, 3, SIZE, SIZE)
    (rows,) = plan(photos, 200)
    expected = []
    for i, (top, left, height, width), flip in zip(
        rows.ids, rows.boxes.tolist(), rows.flips, strict=True
    ):
        image = (
            Image.open(photos.name(i)).convert("RGB").crop((left, top, left + width, top + height))
        )
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.int64)
        expected.append((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1))
    difference = np.abs(found.numpy() - np.stack(expected))
    assert difference.mean() <= 0.25, difference.mean()
    assert difference.max() <= 10, difference.max()


def test_equal_over_processes_threads_and_prefetch(photos: FolderSource) -> None:
    here = digests(photos, threads=1, prefetch=2)
    assert digests(photos, threads=3, prefetch=1) == here
    assert digests(photos, threads=2, prefetch=4) == here
    code = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('there', {__file__!r})\n"
        "there = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(there)\n"
        f"print(json.dumps(there.digests(there.open_folder({photos.location!r}), threads=2)))\n"
    )
    there = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert json.loads(there.splitlines()[-1]) == here


def test_any_start_gives_the_rest(photos: FolderSource) -> None:
    def hashes(first: int) -> list[str]:
        rows = itertools.islice(plan(photos, 25), first, None)
        stream = dali.stream(rows, photos, (SIZE, SIZE), 1, 25)
        return [hashlib.sha1(images.numpy().tobytes()).hexdigest() for _, images in stream]

    whole = hashes(0)
    assert len(set(whole)) == 8
    for first in (1, 4, 7, 8):
        assert hashes(first) == whole[first:]


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8" + bytes(200), "half", None])
def test_a_bad_file_is_one_line(
    photos: FolderSource, tmp_path: Path, data: bytes | str | None
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(photos.read(i))
    source = open_folder(tmp_path)
    good, late = plan(source, 2)
    bad = DecodeRequest(np.array([0, 3]), good.boxes, good.flips)
    path = tmp_path / "3.jpg"
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    if data == "half":
        path.write_bytes(photos.read(3)[:1500])
    stream = dali.stream(iter([good, bad, late]), source, (SIZE, SIZE), 1, 2)
    assert next(stream)[1].shape == (2, 3, SIZE, SIZE), "what is read ahead fails in its turn"
    with pytest.raises(BadImage, match=r"^DALI: ") as error:
        next(stream)
    if data is None:
        assert str(error.value) == f"DALI: {path}: No such file or directory"
    assert "\n" not in str(error.value)
    assert list(stream) == []


def test_chosen_where_asked_for() -> None:
    loader, decode, line = choose_loader("dali", "auto", torch.device("cpu"))
    assert (loader, decode) == ("dali", "cpu")
    assert line == "loader dali (asked for): decode cpu, resize on the CPU"


def test_training_reaches_the_same_losses(tmp_path: Path) -> None:
    """The sample set through DALI and through the torch backend: curves within 2 %."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert write_samples(tmp_path / "set")
    source = open_folder(tmp_path / "set" / "train")
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
    loaders: list[Literal["torch", "dali"]] = ["torch", "dali"]
    for loader in loaders:
        backend, _ = build_backend(config, source, 32, torch.device("cpu"), loader)
        step_loader = build_step_loader(
            config, source, SamplePlan(len(source), 0, 32), Share(), Span(0, 120), backend=backend
        )
        model = build_model(model_config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for (batch,) in step_loader:
            out = local_backward(model, normalize(batch.images), noise=batch.noise)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(out.loss))
        curves[loader] = np.array(losses)
    assert curves["torch"][-20:].mean() < 0.8 * curves["torch"][:20].mean(), "it must learn"
    difference = np.abs(curves["dali"] / curves["torch"] - 1)
    print(f"largest difference of a step {difference.max():.4f}, mean {difference.mean():.5f}")
    assert difference.max() <= 0.02, difference.max()
