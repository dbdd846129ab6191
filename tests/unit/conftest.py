"""What unit tests share."""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepmim_scale.checkpoint import files
from deepmim_scale.data.samples import PHOTOS, write_samples
from deepmim_scale.models import build_model
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.folder import write_config


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 200 real JPEGs: every fourth training region of the sample photographs."""
    base = tmp_path_factory.mktemp("photographs")
    write_samples(base / "samples")
    flat = base / "flat"
    flat.mkdir()
    files = [path for name in PHOTOS for path in (base / "samples/train" / name).iterdir()]
    for path in sorted(files)[::4]:
        shutil.copy(path, flat / f"{path.parent.name}_{path.name}")
    assert len(list(flat.iterdir())) == 200
    return flat


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """preset -> folder of a run of it with a checkpoint of drawn weights, for reading only."""

    @functools.cache
    def make(preset: str) -> Path:
        run = tmp_path_factory.mktemp(preset)
        config = load_preset(preset).replace(output=str(run))
        write_config(config)
        generator = torch.Generator().manual_seed(zlib.crc32(preset.encode()))
        weights = {
            name: parameter + 0.05 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in build_model(config.model).named_parameters()
            if parameter.requires_grad
        }
        final = files.step_folder(run, 7)
        files.begin_checkpoint(final)
        file = files.part_folder(final) / "weights_stage00.safetensors"
        files.commit_checkpoint(final, {"step": 7}, {file.name: files.write_tensors(file, weights)})
        return run

    return make
