"""Checkpoint folders: atomic, verified, readable by any number of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepmim_scale.checkpoint import files
from deepmim_scale.cli import main
from deepmim_scale.errors import UserError


def write(run: Path, step: int, stages: int = 2) -> Path:
    final = files.step_folder(run, step)
    files.begin_checkpoint(final)
    digests = {}
    for stage in range(stages):
        tensors = {f"blocks.{stage}.weight": torch.full((3, 2), float(step + stage))}
        file = files.part_folder(final) / f"weights_stage{stage:02d}.safetensors"
        digests[file.name] = files.write_tensors(file, tensors)
    files.commit_checkpoint(final, {"step": step}, digests)
    return final


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [folder.name for folder in files.list_checkpoints(tmp_path)] == [
        "step_00000001",
        "step_00000002",
        "step_00000010",
    ]
    folder, problems = files.latest_intact(tmp_path)
    assert (folder, problems) == (files.step_folder(tmp_path, 10), [])
    tensors = files.read_tensors(folder, "weights")
    assert tensors["blocks.1.weight"].tolist() == [[11.0, 11.0]] * 3
    assert list(files.read_tensors(folder, "weights", ["blocks.0.weight"])) == ["blocks.0.weight"]
    with pytest.raises(ValueError, match=r"blocks\.7\.weight is in no weights file"):
        files.read_tensors(folder, "weights", ["blocks.7.weight"])
    files.prune(tmp_path, 2)
    assert len(files.list_checkpoints(tmp_path)) == 2
    assert len(list(files.verify(tmp_path))) == 2


def test_unfinished_save_is_ignored(tmp_path: Path) -> None:
    good = write(tmp_path, 3)
    files.begin_checkpoint(files.step_folder(tmp_path, 4))
    assert files.latest_intact(tmp_path) == (good, [])
    assert files.resolve(tmp_path) == good
    assert files.resolve(good) == good


@pytest.mark.parametrize("damage", ["missing", "truncated", "no state", "bad state"])
def test_damage_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / "weights_stage01.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no state":
        file = bad / "state.json"
        file.unlink()
    else:
        file = bad / "state.json"
        file.write_text("{")
    folder, problems = files.latest_intact(tmp_path)
    assert folder == good
    assert len(problems) == 1
    assert str(file) in problems[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory, data) -> None:
    folder = write(tmp_path_factory.mktemp("flip"), 1, stages=1)
    file = folder / "weights_stage00.safetensors"
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert "damaged" in (files.integrity_error(folder) or "")


def test_verify_checks_all(tmp_path: Path, capsys) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3)]
    (folders[0] / "state.json").write_text("{")
    (folders[1] / "weights_stage01.safetensors").unlink()
    for place in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(SystemExit) as stop:
            main(["verify", str(place)])
        captured = capsys.readouterr()
        first, second, third = captured.out.splitlines()
        assert first == f"{folders[0]}/state.json: unreadable (JSONDecodeError)"
        assert second == f"{folders[1]}/weights_stage01.safetensors: missing"
        assert third == f"{folders[2]}: intact, step 3"
        assert stop.value.code == 2
        assert captured.err.startswith(f"error: {place}: 2 of 3 checkpoints damaged; delete ")
        assert captured.err.count("\n") == 1
    main(["verify", str(folders[2])])
    assert capsys.readouterr().out == f"{folders[2]}: intact, step 3\n"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable checkpoint"):
        files.resolve(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        list(files.verify(tmp_path))
