"""`--init-from`: what a run begins with; `--lr-schedule wsd`: how it is extended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepmim_scale.checkpoint import files, networks
from deepmim_scale.checkpoint.initial import Initial, initial_weights, put
from deepmim_scale.cli import main
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.models import build_model
from deepmim_scale.models.classifier import resize_position_table
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.folder import list_checkpoints, step_folder, write_config
from deepmim_scale.runs.resume import check_output
from deepmim_scale.runs.state import CheckpointState, read_state
from deepmim_scale.train.optim import run_rate
from deepmim_scale.train.restore import Wanted, _find

DEBUG = "debug"


def begin(run: Path | str, preset: str = DEBUG, **changes: Any) -> tuple[RunConfig, Initial]:
    config = load_preset(preset)
    model = changes.pop("model", {})
    config = config.replace(model=config.model.replace(**model), init_from=str(run), **changes)
    return config, initial_weights(config)


def test_everything_of_a_run_of_the_same_kind(finished_run: Callable[[str], Path]) -> None:
    run = finished_run(DEBUG)
    config, initial = begin(run)
    assert initial.note.endswith("; new: nothing")
    model = build_model(config.model, seed=9)
    put(initial, model)
    for name, value in networks.trained(str(run)).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_other_taps_get_new_decoders(finished_run: Callable[[str], Path]) -> None:
    _, initial = begin(finished_run(DEBUG), model={"taps": (2, 6, 9, 12)})
    assert "decoders block06, block09, block12" in initial.note
    assert initial.note.endswith("; new: block02")
    assert not any(name.startswith("decoders.block02") for name in initial.tensors)


@pytest.mark.parametrize(
    ("way", "origins"),
    [("stack", [*range(12), *range(12)]), ("interleave", [i // 2 for i in range(24)])],
)
def test_a_deeper_encoder(
    way: str, origins: list[int], finished_run: Callable[[str], Path]
) -> None:
    run = finished_run(DEBUG)
    taps = {"depth": 24, "taps": (6, 12, 18, 24)}
    _, initial = begin(run, model=taps, init_depth=way)
    source = networks.trained(str(run)).state_dict()
    for block, origin in enumerate(origins):
        name = "mlp.fc1.weight"
        expected = source[f"blocks.{origin}.{name}"]
        assert torch.equal(initial.tensors[f"blocks.{block}.{name}"], expected)
    assert f"12 blocks, {way}" in initial.note
    with pytest.raises(UserError, match="has 12 blocks, the run 24; choose --init-depth"):
        begin(run, model=taps)


def test_another_resolution_resizes_the_table(finished_run: Callable[[str], Path]) -> None:
    run = finished_run(DEBUG)
    _, initial = begin(run, model={"img_size": 96})
    table = networks.trained(str(run)).state_dict()["pos_embed"]
    assert torch.equal(initial.tensors["pos_embed"], resize_position_table(table, 12))
    assert "position table resized to 96 px" in initial.note
    assert not any(n.endswith("pos_embed") for n in initial.tensors if n.startswith("decoders"))


@pytest.mark.parametrize("layout", ["timm", "mae", "hf"])
def test_files(layout: str, finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    run, file = finished_run("debug_mae"), tmp_path / "model.safetensors"
    main(["export", str(run), "--format", layout, "--output", str(file)])
    bare = tmp_path / "bare.pth"  # as the official code saves it, without a header
    torch.save({"model": load_file(file)}, bare)
    for path in (file, bare):
        if path == bare:  # heads of 64 would be assumed: 1 instead of 4
            with pytest.raises(UserError, match="num_heads 1, the run 4"):
                begin(path, "debug_mae")
            continue
        config, initial = begin(path, "debug_mae")
        assert initial.note.endswith("; new: block12"), "files hold no decoders of ours"
        model, expected = build_model(config.model, seed=9), networks.trained(str(run))
        put(initial, model)
        for name, value in expected.state_dict().items():
            if not name.startswith("decoders."):
                assert torch.equal(model.state_dict()[name], value), name


def test_sizes_must_agree(finished_run: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="has embed_dim 64, the run 128; give the same with --emb"):
        begin(finished_run(DEBUG), model={"embed_dim": 128})
    with pytest.raises(UserError, match="has 12 blocks, the run 6; fewer cannot"):
        begin(finished_run(DEBUG), model={"depth": 6, "taps": (3, 6)})


def checkpoint(run: Path, step: int, total: int, tensors: dict[str, Tensor]) -> None:
    final = step_folder(run, step)
    files.begin_checkpoint(final)
    file = files.part_folder(final) / "weights_stage00.safetensors"
    state = CheckpointState(
        step=step,
        updates=step,
        total_steps=total,
        global_batch=8,
        manifest_sha="sha",
        precision="fp32",
        num_stages=1,
        sha256={file.name: files.write_tensors(file, tensors)},
    )
    files.commit_checkpoint(final, state)


def test_a_checkpoint_keeps_its_own_table(tmp_path: Path) -> None:
    """Frozen, and yet not the one that a model of this size is built with."""
    config = load_preset(DEBUG).replace(output=str(tmp_path))
    write_config(config)
    state = build_model(config.model).state_dict()
    state["pos_embed"] = state["pos_embed"] + 1
    checkpoint(tmp_path, 3, 9, {name: value.clone() for name, value in state.items()})
    assert torch.equal(
        networks.trained(str(tmp_path)).state_dict()["pos_embed"], state["pos_embed"]
    )


def test_wsd_stays_and_falls() -> None:
    config = RunConfig(lr_schedule="wsd", warmup_epochs=10, decay_share=0.25)
    found = [run_rate(config, 2.0, epoch, 100) for epoch in (0, 5, 10, 60, 75, 81.25, 100, 120)]
    assert found == pytest.approx([0, 1, 2, 2, 2, 1, 0, 0])
    longer = [run_rate(config, 2.0, epoch, 200) for epoch in (5, 60, 75)]
    assert longer == found[1:2] + found[3:5], "up to its decay it does not depend on the length"
    cosine = config.replace(lr_schedule="cosine")
    assert run_rate(cosine, 2.0, 55, 100) == pytest.approx(1.0)


def test_a_wsd_run_may_be_extended_before_its_decay(tmp_path: Path) -> None:
    config = load_preset(DEBUG).replace(output=str(tmp_path), lr_schedule="wsd", steps=100)
    write_config(config)
    tensors = {"x": torch.zeros(1)}
    checkpoint(tmp_path, 80, 100, tensors)
    assert check_output(config.replace(steps=200))
    with pytest.raises(UserError, match="holds another run"):
        check_output(config.replace(steps=200, blr=1e-3))

    def start(step: str, total: int) -> int:
        wanted = Wanted(str(tmp_path), "auto", step, "data", "sha", "", "fp32", 0.2)  # type: ignore[arg-type]
        return _find(wanted, total).step

    assert start("", 200) == 80
    checkpoint(tmp_path, 100, 100, tensors)
    assert start("", 100) == 100, "the same length goes on as ever"
    with pytest.raises(UserError, match="step 100 lies in the decay of a run of 100, which beg"):
        start("", 200)
    assert start("80", 200) == 80
    with pytest.raises(UserError, match="step 80 lies in the decay of a run of 90"):
        start("80", 90)
    assert [read_state(folder).total_steps for folder in list_checkpoints(tmp_path)] == [100, 100]


def test_a_cosine_run_keeps_its_length(tmp_path: Path) -> None:
    config = load_preset(DEBUG).replace(output=str(tmp_path), steps=100)
    write_config(config)
    checkpoint(tmp_path, 80, 100, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"holds another run .steps 100 -> 200"):
        check_output(config.replace(steps=200))


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.pdparams", b"x", "is Paddle's"),
        ("a.pth", b"nonsense", "cannot be read"),
        ("a.safetensors", b"nonsense", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            begin(tmp_path / name)
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"conv1.weight: not part of a plain ViT"):
        begin(tmp_path / "resnet.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no weights by name"):
        begin(tmp_path / "list.pth")
