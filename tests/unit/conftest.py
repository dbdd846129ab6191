"""What unit tests share."""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from deepmim_scale.checkpoint import files
from deepmim_scale.data.samples import PHOTOS, write_samples
from deepmim_scale.models import build_model
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.folder import step_folder, write_config
from deepmim_scale.runs.state import CheckpointState
from deepmim_scale.train.pretrain import main


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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 training images of one class, where nothing better is defined."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train" / "a").mkdir(parents=True)
    for number in range(16):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "train" / "a" / f"{number}.png")
    return folder


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """pretrain's words -> its one line of error, with exit code 2 and no process group."""

    def run(words: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(words)
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, f"not one line: {captured.err}"
        assert not dist.is_initialized()
        return captured.err

    return run


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
        final = step_folder(run, 7)
        files.begin_checkpoint(final)
        file = files.part_folder(final) / "weights_stage00.safetensors"
        state = CheckpointState(
            step=7,
            updates=7,
            total_steps=7,
            global_batch=8,
            manifest_sha="",
            precision="fp32",
            num_stages=1,
            sha256={file.name: files.write_tensors(file, weights)},
        )
        files.commit_checkpoint(final, state)
        return run

    return make
