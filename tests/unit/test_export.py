"""Exported weights give the features that ours give, in timm and under transformers' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deepmim_scale.analysis.commands import (
    AttentionArguments,
    CkaArguments,
    ReconstructArguments,
)
from deepmim_scale.arguments import parse
from deepmim_scale.checkpoint import load_official
from deepmim_scale.checkpoint.commands import ExportArguments, VerifyArguments
from deepmim_scale.checkpoint.export import TENSORS, how_to_load
from deepmim_scale.cli import main
from deepmim_scale.evaluate.commands import DigitsArguments, KnnArguments, LinearArguments
from deepmim_scale.evaluate.features import load_model
from deepmim_scale.models import build_model
from deepmim_scale.presets import PRESETS, load_preset
from deepmim_scale.runs.folder import step_folder
from deepmim_scale.settings import FrozenConfig

METHODS = ["debug", "debug_mae", "debug_mirl"]
EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def export(run: Path, layout: str, output: Path) -> dict[str, Tensor]:
    main(["export", str(run), "--format", layout, "--output", str(output)])
    return load_file(output)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def last(run: Path, images: Tensor) -> Tensor:
    """Our encoder's output for unmasked images, class token first."""
    *_, tokens = load_model(run).features(images)
    return tokens


@pytest.mark.parametrize("preset", METHODS)
def test_timm(
    preset: str,
    finished_run: Callable[[str], Path],
    images: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, expected = tmp_path / "model.safetensors", last(finished_run(preset), images)
    export(finished_run(preset), "timm", path)
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("load it with ")
    model = eval(line, {"timm": timm}).eval()  # what the user is told
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, **EXACT)
        torch.testing.assert_close(model(images), expected[:, 0], **EXACT)
        line = line.replace("num_classes=0", "num_classes=0, global_pool='avg', fc_norm=False")
        average = eval(line, {"timm": timm}).eval()
        torch.testing.assert_close(average(images), expected[:, 1:].mean(1), **EXACT)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_timm(preset: str) -> None:
    """Names and shapes of timm's model as its own constructor makes it."""
    config = load_preset(preset).model
    line = how_to_load(config, "timm", Path("x")).replace("checkpoint_path='x'", "")
    with torch.device("meta"):
        expected = eval(line, {"timm": timm}).state_dict()
    ours = TENSORS["timm"](build_model(config, device="meta"))
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in expected.items()}


def hf_forward(weights: dict[str, Tensor], images: Tensor, num_heads: int, patch: int) -> Tensor:
    """transformers' ViT written down once more, from the names in its hub files."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias"), 1e-6
        )

    projection = "vit.embeddings.patch_embeddings.projection"
    x = F.conv2d(
        images, weights.pop(f"{projection}.weight"), weights.pop(f"{projection}.bias"), patch
    )
    x = x.flatten(2).transpose(1, 2)
    cls = weights.pop("vit.embeddings.cls_token").expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1) + weights.pop("vit.embeddings.position_embeddings")
    number = 0
    while f"vit.encoder.layer.{number}.output.dense.weight" in weights:
        layer = f"vit.encoder.layer.{number}"
        h = norm(f"{layer}.layernorm_before", x)
        q, k, v = (
            linear(f"{layer}.attention.attention.{role}", h)
            .unflatten(2, (num_heads, -1))
            .transpose(1, 2)
            for role in ("query", "key", "value")
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{layer}.attention.output.dense", mixed)
        h = F.gelu(linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", x)))
        x = x + linear(f"{layer}.output.dense", h)
        number += 1
    return norm("vit.layernorm", x)


@pytest.mark.parametrize("preset", METHODS)
def test_hf(
    preset: str, finished_run: Callable[[str], Path], images: Tensor, tmp_path: Path
) -> None:
    weights = export(finished_run(preset), "hf", tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    got = hf_forward(weights, images, config["num_attention_heads"], config["patch_size"])
    torch.testing.assert_close(got, last(finished_run(preset), images), rtol=1e-5, atol=1e-5)
    # What is left is ViTMAE's decoder, for MAE only.
    parts = {
        f"{part}.{kind}"
        for part in (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
            "layernorm_before",
            "layernorm_after",
        )
        for kind in ("weight", "bias")
    }
    decoder = {f"decoder.decoder_layers.{n}.{part}" for n in range(2) for part in parts}
    decoder |= {
        f"decoder.decoder_{part}.{kind}"
        for part in ("embed", "norm", "pred")
        for kind in ("weight", "bias")
    }
    decoder |= {"decoder.mask_token", "decoder.decoder_pos_embed"}
    assert set(weights) == (decoder if preset == "debug_mae" else set())
    assert config["model_type"] == ("vit_mae" if preset == "debug_mae" else "vit")


@pytest.mark.parametrize("preset", METHODS)
def test_transformers(
    preset: str, finished_run: Callable[[str], Path], images: Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run = finished_run(preset)
    export(run, "hf", tmp_path / "model.safetensors")
    if preset != "debug_mae":
        vit = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
        got = vit(images).last_hidden_state.detach()
        torch.testing.assert_close(got, last(run, images), rtol=1e-5, atol=1e-5)
        return
    mae, noise = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path), torch.rand(3, 64)
    torch.testing.assert_close(
        mae(images, noise=noise).loss, load_model(run)(images, noise=noise).loss
    )


@pytest.mark.parametrize("preset", METHODS)
def test_beit_backbone(
    preset: str, finished_run: Callable[[str], Path], images: Tensor, tmp_path: Path
) -> None:
    """Its maps are our tokens after every tapped block, none of them normed."""
    transformers = pytest.importorskip("transformers")
    run = finished_run(preset)
    main(["export", str(run), "--format", "beit", "--output", str(tmp_path / "model.safetensors")])
    backbone = transformers.BeitBackbone.from_pretrained(str(tmp_path)).eval()
    model = load_model(run)
    maps, hidden, expected = backbone(images).feature_maps, model.embed_whole(images), {}
    for number, block in enumerate(model.blocks.values(), start=1):
        hidden = expected[number] = block(hidden)
    assert len(maps) == len(model.config.taps)
    for tap, found in zip(model.config.taps, maps, strict=True):
        tokens = found.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, expected[tap][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", METHODS)
def test_vitdet_backbone(
    preset: str, finished_run: Callable[[str], Path], images: Tensor, tmp_path: Path
) -> None:
    """Its maps are those of timm's ViT of our weights without a class token."""
    transformers = pytest.importorskip("transformers")
    run = finished_run(preset)
    file = tmp_path / "model.safetensors"
    main(["export", str(run), "--format", "vitdet", "--output", str(file)])
    backbone = transformers.VitDetBackbone.from_pretrained(str(tmp_path)).eval()
    model = load_model(run)
    hidden, expected = model.embed_whole(images)[:, 1:], {}
    for number, block in enumerate(model.blocks.values(), start=1):
        hidden = expected[number] = block(hidden)
    for tap, found in zip(model.config.taps, backbone(images).feature_maps, strict=True):
        tokens = found.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, expected[tap], rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "vitdet", "--output", str(file)])


@pytest.mark.parametrize("preset", METHODS)
def test_official_names_come_back(
    preset: str, finished_run: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = export(finished_run(preset), "mae", tmp_path / "model.safetensors")
    expected = load_model(finished_run(preset))
    model = build_model(expected.config, seed=5)
    assert load_official(model, weights, source=model.config.method) == []
    for (name, ours), theirs in zip(
        expected.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_header(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export(finished_run("debug_mirl"), "timm", path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header.items() >= {"preset": "debug_mirl", "method": "mirl", "step": "7"}.items()
    assert "CC-BY-NC" in header["licence"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


CASES = {
    "no run": (["nowhere", "--output", "x.safetensors"], "nowhere: is no run"),
    "no output": (["RUN"], "output: missing; give --output"),
    "unknown format": (
        ["RUN", "--output", "x.safetensors", "--format", "onnx"],
        "format=onnx: must be one of timm, hf, mae",
    ),
    "no file": (["RUN", "--output", "x"], "output=x: must be a file that ends in .safetensors"),
    "not writable": (["RUN", "--output", "/proc/nowhere/x.safetensors"], "cannot be written"),
    "exists": (["RUN", "--output", "old.safetensors"], "output=old.safetensors: exists; delete it"),
    "hf file": (["RUN", "--output", "x.safetensors", "--format", "hf"], "name the file so"),
    "hf beside a run": (
        ["RUN", "--output", "RUN/model.safetensors", "--format", "hf"],
        "config.json: exists",
    ),
    "no checkpoint": (["empty", "--output", "x.safetensors"], "empty: no checkpoints/step_* in it"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes(
    name: str,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    run = finished_run("debug")
    (tmp_path / "old.safetensors").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(SystemExit) as stop:
        main(["export", *(word.replace("RUN", str(run)) for word in words)])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("\n")) == (2, 1)
    assert expected in message
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        AttentionArguments,
        CkaArguments,
        DigitsArguments,
        ExportArguments,
        KnnArguments,
        LinearArguments,
        ReconstructArguments,
        VerifyArguments,
    ],
)
def test_every_command_takes_from(arguments: type[FrozenConfig]) -> None:
    output = ["--output", "x"] if arguments is ExportArguments else []
    given = parse(arguments, ["RUN", "--from", "step_00000007", *output], prog="")
    assert given.model_dump()["from_step"] == "step_00000007"


def test_an_older_checkpoint(
    finished_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run("debug_mae"), run)
    newer = step_folder(run, 9)
    shutil.copytree(step_folder(run, 7), newer)
    load_model(run, "9")
    weights = newer / "weights_stage00.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    output = tmp_path / "x.safetensors"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--from", "9", "--output", str(output)])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("\n")) == (1, 1)
    assert message.startswith(f"error: {weights}: damaged")
    assert not output.exists()
    main(["export", str(run), "--from", "7", "--output", str(output)])
    captured = capsys.readouterr()
    assert "step 7" in captured.out
    assert captured.err == ""
    output.unlink()
    main(["export", str(run), "--output", str(output)])
    assert capsys.readouterr().err.startswith(f"warning: {weights}: damaged")
