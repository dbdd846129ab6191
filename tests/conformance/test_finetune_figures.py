"""Fine-tuning against the official code's figures, in float64; golden/README.md tells their origin.

Model, groups, schedule, losses, updates, average, resized positions, transforms and mixing.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deepmim_scale.checkpoint.sizes import EncoderSizes
from deepmim_scale.evaluate.heads import LinearHead
from deepmim_scale.finetune.mixing import Mixing
from deepmim_scale.finetune.recipe import build_loss
from deepmim_scale.finetune.transform import evaluation_transform
from deepmim_scale.models.classifier import build_classifier, resize_position_table
from deepmim_scale.train.ema import Ema
from deepmim_scale.train.optim import Lars, finetune_groups, learning_rate

GOLDEN = Path(__file__).parent / "golden"
FIGURES: dict[str, Any] = json.loads((GOLDEN / "finetune.json").read_text())
POOLS: dict[str, Any] = {"mean_pool": "mean", "class_token": "class"}
SIZES = EncoderSizes(16, 4, 32, 4, 4, 4.0)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "finetune.npz") as file:
        found = dict(file)
    aliases = FIGURES["arrays_stored_under_another_name"]
    return found | {name: found[other] for name, other in aliases.items()}


def golden_model(arrays: dict[str, np.ndarray], pool: Any) -> nn.Module:
    model = build_classifier(SIZES, 10, pool).double()
    weights = {
        name: torch.from_numpy(arrays[f"param/{name}"]).double() for name in model.state_dict()
    }
    model.load_state_dict(weights)
    return model.eval()


def images_and_labels(arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(arrays["in/images"]).double()
    return images, torch.from_numpy(arrays["in/labels"])


@pytest.mark.parametrize("case", FIGURES["groups"])
def test_layer_decay(case: str) -> None:
    expected = FIGURES["groups"][case]
    pool = "mean" if expected["global_pool"] else "class"
    sizes = EncoderSizes(16, 4, 32, expected["depth"], 4, 4.0)
    model = build_classifier(sizes, 10, pool)
    groups = finetune_groups(model, expected["weight_decay"], expected["layer_decay"])
    assert len(groups) == expected["num_groups"]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: [g["lr_scale"], g["weight_decay"]] for g in groups for p in g["params"]}
    assert found == expected["parameters"]


@pytest.mark.parametrize("case", FIGURES["layer_scales"])
def test_layer_scales_of_published_recipes(case: str) -> None:
    expected = FIGURES["layer_scales"][case]
    with torch.device("meta"):
        model = build_classifier(EncoderSizes(16, 8, 8, expected["depth"], 2, 1.0), 2, "mean")
    groups = finetune_groups(model, 0.05, expected["layer_decay"])
    assert len(groups) == expected["num_groups"]
    assert sorted({g["lr_scale"] for g in groups}) == sorted(expected["scale_by_layer_id"])


@pytest.mark.parametrize("case", FIGURES["schedule"])
def test_schedule(case: str) -> None:
    expected = FIGURES["schedule"][case]
    assert expected["blr"] * expected["batch"] / 256 == pytest.approx(expected["peak_lr"])
    for epoch, rate in expected["epoch_lr"]:
        found = learning_rate(
            expected["peak_lr"],
            epoch,
            warmup_epochs=expected["warmup_epochs"],
            total_epochs=expected["epochs"],
            min_lr=expected["min_lr"],
        )
        assert found == pytest.approx(rate, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("case", FIGURES["drop_path"])
def test_drop_path_rates(case: str) -> None:
    expected = FIGURES["drop_path"][case]
    with torch.device("meta"):
        sizes = EncoderSizes(16, 8, 8, expected["depth"], 2, 1.0)
        model = build_classifier(sizes, 2, "mean", drop_path=expected["rate"])
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]  # type: ignore[union-attr, operator]
    assert rates == pytest.approx(expected["by_block"], rel=1e-6)


@pytest.mark.parametrize("case", POOLS)
def test_forward(case: str, arrays: dict[str, np.ndarray]) -> None:
    expected, model = FIGURES["forward"][case], golden_model(arrays, POOLS[case])
    images, labels = images_and_labels(arrays)
    norms: list[float] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda m, i, out: norms.append(out.norm().item()))
    with torch.no_grad():
        tokens = model.forward_features(images)  # type: ignore[operator]
        features = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        logits = model.head(features)  # type: ignore[operator]
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(features, arrays[f"out/{case}/features"], rtol=0, atol=1e-9)
    assert norms == pytest.approx(expected["block_output_norm"], rel=1e-9)
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert top1 == pytest.approx(expected["top1_percent"], rel=1e-6)


@pytest.mark.parametrize("kind", ["soft_target", "label_smoothing_0.1", "cross_entropy"])
@pytest.mark.parametrize("case", POOLS)
def test_losses(case: str, kind: str, arrays: dict[str, np.ndarray]) -> None:
    expected, model = FIGURES["loss"][case][kind], golden_model(arrays, POOLS[case])
    images, targets = images_and_labels(arrays)
    if kind == "soft_target":
        targets = torch.from_numpy(arrays["in/soft_targets"]).double()
    smoothing = 0.1 if "smoothing" in kind else 0.0
    loss = build_loss(mixes=kind == "soft_target", smoothing=smoothing)(model(images), targets)
    loss.backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(expected["value"], rel=1e-9)
    assert np.linalg.norm(list(norms.values())) == pytest.approx(
        expected["grad_norm_global"], rel=1e-9
    )
    for name, value in expected.get("grad_norm", {}).items():
        assert norms[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("case", FIGURES["train"])
def test_five_updates(case: str, arrays: dict[str, np.ndarray]) -> None:
    expected = FIGURES["train"][case]
    config = expected["config"]
    model = golden_model(arrays, "mean" if config["global_pool"] else "class").train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = finetune_groups(model, config["weight_decay"], config["layer_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config["betas"], eps=config["eps"])
    mixes = bool(config["mixup"])
    loss_of = build_loss(mixes=mixes, smoothing=config["smoothing"])
    images = torch.from_numpy(arrays[f"train/{case}/images"]).double()
    targets = torch.from_numpy(arrays[f"train/{case}/{'targets' if mixes else 'labels'}"])
    targets = targets.double() if mixes else targets
    micro, losses, norms, rates = config["accum_iter"], [], [], []
    for first in range(0, len(images), micro):
        rates.append(
            learning_rate(
                config["lr"],
                config["epoch"] + first / len(images),
                warmup_epochs=config["warmup_epochs"],
                total_epochs=config["epochs"],
                min_lr=config["min_lr"],
            )
        )
        for group in optimizer.param_groups:
            group["lr"] = rates[-1] * group["lr_scale"]
        for i in range(first, first + micro):
            loss = loss_of(model(images[i]), targets[i])
            losses.append(loss.item())
            (loss / micro).backward()
        limit = config["clip_grad"] or float("inf")
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(expected["loss_per_microbatch"], rel=1e-9)
    assert norms == pytest.approx(expected["grad_norm_per_update"], rel=1e-9)
    assert rates == pytest.approx(expected["lr_per_update"], rel=1e-12)
    end = dict(model.named_parameters())
    for name, value in expected["final_param_norm"].items():
        assert end[name].norm().item() == pytest.approx(value, rel=1e-9), name
    for name, value in expected["final_minus_initial_norm"].items():
        assert (end[name] - start[name]).norm().item() == pytest.approx(value, rel=1e-8), name
    with torch.no_grad():
        logits = model.eval()(images_and_labels(arrays)[0])
    np.testing.assert_allclose(logits, expected["final_logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", FIGURES["ema"])
def test_average_of_weights(case: str) -> None:
    expected = FIGURES["ema"][case]
    rows = {row["updates"]: row for row in expected["rows"]}

    def draw(name: str) -> Tensor:
        random = np.random.RandomState(zlib.crc32(f"{expected['stream']}/{name}".encode()))
        return torch.from_numpy(random.standard_normal(expected["shape"]))

    weight = draw("weight")
    average = Ema({"w": weight}, expected["decay"])
    for update in range(1, max(rows) + 1):
        weight = weight + 0.01 * draw(f"step{update}")
        average.update({"w": weight})
        if update in rows:
            found, row = average.averages()["w"], rows[update]
            assert weight.sum().item() == pytest.approx(row["weight_sum"], rel=1e-9)
            assert found.sum().item() == pytest.approx(row["ema_sum"], rel=1e-9)
            assert found.norm().item() == pytest.approx(row["ema_norm"], rel=1e-9)
            assert found[0, 0].item() == pytest.approx(row["ema_first"], rel=1e-9)


@pytest.mark.parametrize("case", FIGURES["pos_embed"])
def test_resized_positions(case: str, arrays: dict[str, np.ndarray]) -> None:
    source, result = (torch.from_numpy(arrays[f"{case}/{part}"]) for part in ("source", "result"))
    found = resize_position_table(source, round((result.shape[1] - 1) ** 0.5))
    torch.testing.assert_close(found, result, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["mix", "cut_even"])
def test_mixing(case: str, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = FIGURES["mixup"][case]
    images, labels = (torch.from_numpy(arrays[f"{case}/{part}"]) for part in ("images", "labels"))
    mixing = Mixing(
        mixup=expected["mixup"],
        cutmix=expected["cutmix"],
        smoothing=expected["smoothing"],
        num_classes=10,
        seed=0,
    )
    # The official draws, in place of ours.
    monkeypatch.setattr(
        "deepmim_scale.finetune.mixing.seed_mixing",
        lambda *_: np.random.seed(expected["seed"]),  # noqa: NPY002
    )
    mixed, targets = mixing(images.clone(), labels, 0, 0)
    np.testing.assert_allclose(mixed, arrays[f"{case}/mixed"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets, arrays[f"{case}/targets"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", FIGURES["eval_transform"])
def test_evaluation_transform(case: str, arrays: dict[str, np.ndarray]) -> None:
    expected = FIGURES["eval_transform"][case]
    found = evaluation_transform(expected["input_size"])(
        Image.fromarray(arrays[f"{case}/source"])
    ).double()
    assert found.sum().item() == pytest.approx(expected["sum"], abs=1e-2)
    assert found.norm().item() == pytest.approx(expected["norm"], rel=1e-6)
    if f"{case}/result" in arrays:
        np.testing.assert_allclose(found, arrays[f"{case}/result"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", FIGURES["linear_probe"])
def test_five_lars_updates_of_the_linear_probe(case: str, arrays: dict[str, np.ndarray]) -> None:
    expected = FIGURES["linear_probe"][case]
    config = expected["config"]
    head = LinearHead(32, 10, "class").double()
    weights = {n: torch.from_numpy(arrays[f"param/head.{n}"]) for n in ("weight", "bias")}
    head.linear.load_state_dict(weights)
    start = head.linear.weight.detach().clone()
    optimizer = Lars(head.parameters(), 0.0, weight_decay=config["weight_decay"])
    features = torch.from_numpy(arrays[f"probe/{case}/features"])
    labels = torch.from_numpy(arrays[f"probe/{case}/labels"])
    losses, norms = [], []
    for step in range(config["updates"]):
        rate = learning_rate(
            config["lr"],
            config["epoch"] + step / config["updates"],
            warmup_epochs=config["warmup_epochs"],
            total_epochs=config["epochs"],
        )
        assert rate == pytest.approx(expected["lr_per_update"][step], rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Tokens whose first is the feature, as a class token is.
        loss = nn.functional.cross_entropy(head(features[step][:, None]), labels[step])
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.get_total_norm([p.grad for p in head.parameters()]).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(expected["loss_per_update"], rel=1e-9)
    assert norms == pytest.approx(expected["grad_norm_per_update"], rel=1e-9)
    moved = (head.linear.weight - start).norm().item()
    assert moved == pytest.approx(expected["final_minus_initial_weight_norm"], rel=1e-8)
    for ours, theirs in (
        (head.linear.weight, "final_head_weight"),
        (head.linear.bias, "final_head_bias"),
        (head.norm.running_mean, "running_mean"),
        (head.norm.running_var, "running_var"),
    ):
        assert isinstance(ours, Tensor)
        np.testing.assert_allclose(ours.detach(), arrays[f"probe/{case}/{theirs}"], rtol=1e-9)
