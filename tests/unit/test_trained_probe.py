"""Probes that train on frozen tokens: heads, LARS' companion, choice, resumption, foreign files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from color_classes import write_color_classes
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepmim_scale.checkpoint.sizes import EncoderSizes, header_of
from deepmim_scale.cli import main
from deepmim_scale.errors import UserError
from deepmim_scale.evaluate.features import load_model
from deepmim_scale.evaluate.frozen import open_frozen
from deepmim_scale.evaluate.heads import AttentiveHead, LinearHead
from deepmim_scale.evaluate.trained_probe import Contestant, ProbePlan, TrainedProbe, split
from deepmim_scale.finetune.data import open_labelled
from deepmim_scale.finetune.draws import seed_sample
from deepmim_scale.finetune.transform import OneTryCrop, evaluation_transform, probe_transform
from deepmim_scale.models.classifier import build_classifier
from deepmim_scale.train.optim import Lars

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 8 training images and 3 for validation each."""
    root = tmp_path_factory.mktemp("colors")
    return write_color_classes(root, train=8, val=3, size=(70, 66))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("heads", [1, 2])
def test_attentive_head_against_loops(heads: int) -> None:
    width = 24 if heads == 1 else 128  # heads of 64, one where that does not fit
    torch.manual_seed(0)
    head, tokens = AttentiveHead(width, 5).double(), torch.randn(3, 1 + 6, width).double()
    with torch.no_grad():
        head.query.copy_(torch.randn(1, 1, width))
        patches = tokens[:, 1:]
        projected = patches @ head.keys_values.weight.T + head.keys_values.bias
        keys, values = projected[..., :width], projected[..., width:]
        pooled = torch.zeros(3, width, dtype=torch.float64)
        size = width // heads
        for image in range(3):
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = keys[image, :, part] @ head.query[0, 0, part] / size**0.5
                pooled[image, part] = scores.softmax(0) @ values[image, :, part]
        expected = pooled @ head.linear.weight.T + head.linear.bias
        torch.testing.assert_close(head(tokens), expected)


def test_linear_head_reads_what_it_says() -> None:
    tokens = torch.randn(8, 5, 4)
    by_class, by_mean = LinearHead(4, 2, "class"), LinearHead(4, 2, "mean")
    by_mean.load_state_dict(by_class.state_dict())
    changed = tokens.clone()
    changed[:, 1:] += 1 + torch.rand(8, 4, 4)
    assert torch.equal(by_class(tokens), by_class(changed))
    assert not torch.equal(by_mean(tokens), by_mean(changed))


def test_lars_moves_biases_at_the_full_rate() -> None:
    head = LinearHead(4, 2)
    optimizer = Lars(head.parameters(), 0.0)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weight, bias = before["linear.weight"], before["linear.bias"]
    trust = 0.001 * weight.norm() / torch.ones_like(weight).norm()
    torch.testing.assert_close(head.linear.weight, weight - 2 * trust)
    torch.testing.assert_close(head.linear.bias, bias - 2)


def test_crop_of_one_try() -> None:
    """Areas as asked for, unless a side was cut; all of a tiny image otherwise."""
    image = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
    crop, seen = OneTryCrop(16, 0.25), set()
    for sample in range(50):
        seed_sample(0, 0, sample)
        out = crop(image)
        assert out.size == (16, 16)
        seen.add(out.tobytes())
    assert len(seen) == 50
    assert OneTryCrop(16, 1.0)(Image.new("RGB", (1, 9), "red")).getpixel((3, 3)) == (255, 0, 0)


def test_tokens_of_a_run_of_its_export_and_of_timm(
    finished_run: Callable[[str], Path], tmp_path: Path
) -> None:
    run, file = finished_run("debug"), tmp_path / "encoder.safetensors"
    main(["export", str(run), "--output", str(file)])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    trained, untrained = open_frozen(str(run))
    expected = trained.tokens(images)
    assert trained.blocks == (3, 6, 9, 12)
    exported, _ = open_frozen(str(file), blocks=(3, 6, 9, 12))
    found = exported.tokens(images)
    for block, tokens in expected.items():
        torch.testing.assert_close(found[block], tokens, rtol=0, atol=1e-4)
    assert not torch.equal(untrained.tokens(images)[12], expected[12])
    checkpoint, _ = open_frozen(str(run / "checkpoints/step_00000007"))
    assert torch.equal(checkpoint.tokens(images)[12], expected[12])
    *_, last = load_model(run).features(images)
    assert torch.equal(expected[12], last)


def test_a_foreign_network(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    network = timm.create_model(name, num_classes=0).eval()
    file = tmp_path / "tiny.safetensors"
    save_file(network.state_dict(), file)
    encoder, _ = open_frozen(str(file), model=f"timm:{name}")
    assert encoder.blocks == (3, 6, 9, 12)
    pixels = torch.rand(1, 3, 224, 224)
    tokens = encoder.tokens((pixels - 0.45) / 0.225)
    assert tokens[12].shape == (1, 197, 192)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    own = ((pixels - 0.45) / 0.225 * std + mean - 0.5) / 0.5  # its statistics are 0.5
    torch.testing.assert_close(tokens[12], network.forward_features(own), rtol=0, atol=1e-4)


def test_mistakes_about_encoders(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be numbers from 1 to the 12 blocks"):
        open_frozen(str(finished_run("debug")), blocks=(3, 13))
    with pytest.raises(UserError, match="must be timm: and the name of a model"):
        open_frozen("x", model="timm:no_such_network")
    file = tmp_path / "wrong.safetensors"
    save_file(build_classifier(EncoderSizes(16, 8, 16, 2, 2, 4.0), 0, "class").state_dict(), file)
    with pytest.raises(UserError, match="cannot take the weights"):
        open_frozen(str(file), model="timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match="tells no number of heads"):
        open_frozen(str(file))


def test_split_is_disjoint_and_repeats(colors: Path) -> None:
    source = open_labelled(str(colors), "", "fail").train
    kept, held = split(source, 0.25, seed=1)
    assert len(held) == 6
    assert sorted([*kept, *held]) == list(range(24))
    assert split(source, 0.25, seed=1)[1].tolist() == held.tolist()
    assert split(source, 0.25, seed=2)[1].tolist() != held.tolist()


def small_probe(run: Path, data: Path, steps: int, save_every: int = 3) -> TrainedProbe:
    encoder, _ = open_frozen(str(run), blocks=(6, 12))
    sources = open_labelled(str(data), "", "fail")
    transforms = probe_transform(64, min_crop=0.5, flip=0.5), evaluation_transform(64)
    plan = ProbePlan(steps, 6, lambda peak, step: peak, transforms, 0.25, 0, save_every, 3)
    torch.manual_seed(0)
    contestants = []
    for block in encoder.blocks:
        for rate in (0.0, 1e-2):
            head = AttentiveHead(encoder.width, 3)
            optimizer = torch.optim.AdamW(head.parameters(), lr=0.0)
            contestants.append(Contestant(block, f"lr {rate:g}", head, optimizer, rate))
        linear = LinearHead(encoder.width, 3)
        lars = Lars(linear.parameters(), 0.0)
        contestants.append(Contestant(block, "lars", linear, lars, 1.0))
    return TrainedProbe(encoder, sources, contestants, plan, CPU)


def weights(probe: TrainedProbe) -> dict[str, Tensor]:
    return {
        f"{i} {name}": value
        for i, one in enumerate(probe.contestants)
        for name, value in one.head.state_dict().items()
    }


@pytest.mark.usefixtures("one_process")
def test_goes_on_with_equal_bits_and_chooses(
    finished_run: Callable[[str], Path], colors: Path, tmp_path: Path
) -> None:
    run, settings, state = finished_run("debug"), {"seed": 3}, tmp_path / "state.safetensors"
    whole = small_probe(run, colors, 6)
    whole.run(None, settings)
    small_probe(run, colors, 3).run(state, settings)
    assert int(load_file(state)["optimizer/0.query/step"]) == 3
    late = small_probe(run, colors, 6)
    late.run(state, settings)
    expected, found = weights(whole), weights(late)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(UserError, match="belongs to a probe of other settings"):
        small_probe(run, colors, 6).run(state, {"seed": 4})
    chosen = late.choose()
    held_out = late.count(validation=False)
    for block, (setting, accuracy) in chosen.items():
        mine = {one.setting: one.name for one in late.contestants if one.block == block}
        assert held_out[mine[setting]] == max(held_out[name] for name in mine.values())
        assert accuracy == late.count(validation=True)[mine[setting]]
    untouched = small_probe(run, colors, 6)
    assert torch.equal(weights(untouched)["0 query"], expected["0 query"]), "rate 0 moves nothing"
    assert not torch.equal(weights(untouched)["1 query"], expected["1 query"])


def test_command(finished_run: Callable[[str], Path], colors: Path, tmp_path: Path) -> None:
    """In a process of its own, since it starts a process group."""
    words: list[Any] = ["evaluate", "attentive", finished_run("debug"), "--data", colors]
    words += [
        "--steps",
        "30",
        "--warmup-steps",
        "3",
        "--global-batch",
        "12",
        "--beside",
        "knn",
        "linear",
    ]
    words += ["--learning-rates", "1e-3", "1e-1", "--weight-decays", "0", "--held-out", "0.25"]
    words += ["--loader-workers", "0", "--json", tmp_path / "table.json", "--blocks", "6", "12"]
    command = [sys.executable, "-m", "deepmim_scale.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| block | attentive | knn, mean | linear, mean | chosen |" in done.stdout
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [6, 12]
    for row in rows:
        assert {"attentive": row["accuracy"], **row}.keys() >= {"knn", "linear", "setting"}
        assert min(row["accuracy"], row["knn"], row["linear"]) > 50, "percent; colors are easy"


@pytest.mark.parametrize(
    ("probe", "words", "message"),
    [
        ("linear-sgd", [], "global_batch=16384: larger than the data set of 24 images"),
        ("attentive", ["--global-batch", "23"], "larger than the data set of 22 images"),
        ("attentive", ["--learning-rates"], "learning_rates"),
        ("linear-sgd", ["--state", "/proc/nowhere/x"], "state=/proc/nowhere/x: cannot be written"),
        ("attentive", ["--pool", "mean"], "--pool: unknown flag"),
    ],
)
def test_mistakes(
    probe: str,
    words: list[str],
    message: str,
    finished_run: Callable[[str], Path],
    colors: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", probe, str(finished_run("debug")), "--data", str(colors), *words])
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in told
    assert told.count("\n") == 1
    assert not dist.is_initialized()


def test_a_file_needs_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "encoder.safetensors"
    sizes = EncoderSizes(16, 8, 16, 2, 2, 4.0)
    save_file(build_classifier(sizes, 0, "class").state_dict(), file, header_of(sizes))
    with pytest.raises(SystemExit):
        main(["evaluate", "knn", str(file)])
    assert f"data: missing; {file} does not tell it" in capsys.readouterr().err
