"""Checkpoint folders: atomic, verified, readable by any number of stages."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepmim_scale.checkpoint import files
from deepmim_scale.cli import main
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.runs.folder import list_checkpoints, step_folder
from deepmim_scale.runs.state import FORMAT, CheckpointState, read_state


def write(run: Path, step: int, stages: int = 2) -> Path:
    """A small checkpoint with all its files."""
    final = step_folder(run, step)
    files.begin_checkpoint(final)
    digests = {}
    for stage in range(stages):
        weight = torch.full((3, 2), float(step + stage))
        for kind, prefixes in (("weights", [""]), ("optimizer", ["exp_avg/", "exp_avg_sq/"])):
            tensors = {f"{prefix}blocks.{stage}.weight": weight.clone() for prefix in prefixes}
            file = files.part_folder(final) / f"{kind}_stage{stage:02d}.safetensors"
            digests[file.name] = files.write_tensors(file, tensors)
    state = CheckpointState(
        step=step,
        updates=step - 1,
        total_steps=800,
        global_batch=16,
        manifest_sha="c0ffee",
        precision="float16",
        num_stages=stages,
        loss_scaler={"cur_scale": 65536.0, "cur_iter": step, "last_overflow_iter": -1},
        sha256=digests,
    )
    files.commit_checkpoint(final, state)
    return final


def edit_state(folder: Path, **values: Any) -> None:
    """Change state.json on purpose, its digest too."""
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (folder / files.DIGEST).write_bytes(files._digest_line(folder))


def as_first_format(folder: Path) -> None:
    edit_state(folder, format=1)
    (folder / files.DIGEST).unlink()


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        "step_00000001",
        "step_00000002",
        "step_00000010",
    ]
    folder, problems = files.latest_intact(tmp_path)
    assert folder == step_folder(tmp_path, 10)
    assert problems == []
    tensors = files.read_tensors(folder, "weights")
    assert tensors["blocks.1.weight"].tolist() == [[11.0, 11.0]] * 3
    assert list(files.read_tensors(folder, "weights", ["blocks.0.weight"])) == ["blocks.0.weight"]
    with pytest.raises(ValueError, match=r"blocks\.7\.weight is in no weights file"):
        files.read_tensors(folder, "weights", ["blocks.7.weight"])
    files.prune(tmp_path, 2)
    assert len(list_checkpoints(tmp_path)) == 2
    assert len(list(files.verify(tmp_path))) == 2


@settings(max_examples=30, deadline=None)
@given(
    steps=st.sets(st.integers(1, 30), min_size=1, max_size=8),
    keep=st.integers(1, 5),
    every=st.integers(0, 7),
)
def test_pruning_keeps_the_newest_and_the_multiples(
    steps: set[int], keep: int, every: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("prune")
    for step in steps:
        step_folder(run, step).mkdir(parents=True)
    files.prune(run, keep, every)
    expected = {*sorted(steps)[-keep:], *(s for s in steps if every and s % every == 0)}
    assert list_checkpoints(run) == [step_folder(run, step) for step in sorted(expected)]


def test_state_round_trip(tmp_path: Path) -> None:
    state = read_state(write(tmp_path, 3))
    assert (state.format, state.step, state.updates) == (FORMAT, 3, 2)
    assert state.loss_scaler == {"cur_scale": 65536.0, "cur_iter": 3, "last_overflow_iter": -1}
    assert isinstance(state.loss_scaler["cur_iter"], int), "a count stays a count"


def test_formats(tmp_path: Path) -> None:
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    as_first_format(old)
    assert files.integrity_error(old) is None
    assert read_state(old).step == 1
    edit_state(new, format=FORMAT + 1, unheard_of=True)
    for use in (read_state, files.integrity_error, files.resolve):
        with pytest.raises(UserError) as caught:
            use(new)
        assert str(caught.value) == (
            f"{new}/state.json: has format {FORMAT + 1}, this deepmim_scale reads up to {FORMAT}; "
            "use a newer deepmim_scale"
        )
    with pytest.raises(UserError, match="use a newer"):  # not the older one: it is not damaged
        files.latest_intact(tmp_path)


def test_unfinished_save_is_ignored(tmp_path: Path) -> None:
    good = write(tmp_path, 3)
    files.begin_checkpoint(step_folder(tmp_path, 4))
    assert files.latest_intact(tmp_path) == (good, [])
    assert files.resolve(tmp_path) == good
    assert files.resolve(good) == good


DAMAGES = {
    "missing": "weights_stage01.safetensors",
    "truncated": "weights_stage01.safetensors",
    "no state": "state.json",
    "bad state": "state.json",
    "no digest": "state.json.sha256",
    "bad digest": "state.json",
    "bad state of the first format": "state.json",
}


def damage(folder: Path, kind: str) -> Path:
    """Do it, and return the file that has to be named."""
    file = folder / DAMAGES[kind]
    if kind.endswith("first format"):
        as_first_format(folder)
        file.write_text('{"format": 1, "step": "three"}')
    elif kind == "bad digest":
        (folder / files.DIGEST).write_text("")
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "bad state":
        file.write_text("{")
    else:
        file.unlink()
    return file


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_passed_over(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = damage(bad, kind)
    folder, problems = files.latest_intact(tmp_path)
    assert folder == good
    assert len(problems) == 1
    assert str(file) in problems[0]
    assert files.resolve(tmp_path) == good
    assert capsys.readouterr().err == f"warning: {problems[0]}; using step_00000001\n"
    # However a checkpoint is named, it is verified.
    for path, step in ((bad, ""), (tmp_path, "2"), (tmp_path, "step_00000002")):
        with pytest.raises(RunFailure, match="choose another checkpoint") as caught:
            files.resolve(path, step)
        assert str(file) in str(caught.value)
    shutil.rmtree(good)
    with pytest.raises(RunFailure, match="no checkpoint is intact"):
        files.resolve(tmp_path)


def test_every_one_of_200_flipped_bits_is_found(tmp_path: Path) -> None:
    folder, source = write(tmp_path, 1, stages=2), random.Random(0)
    assert files.integrity_error(folder) is None
    everything = sorted(folder.iterdir())
    assert {file.name.split("_")[0] for file in everything} == {
        "optimizer",
        "weights",
        "state.json",
        "state.json.sha256",
    }
    flipped = set()
    for number in range(200):
        file = everything[number % len(everything)]
        whole = file.read_bytes()
        content = bytearray(whole)
        bit = source.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        assert files.integrity_error(folder) is not None, f"{file.name}, bit {bit}"
        file.write_bytes(whole)
        flipped.add((file, bit))
    assert len(flipped) > 190
    assert files.integrity_error(folder) is None


def test_the_digest_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    digest, name = (folder / "state.json.sha256").read_text().split()
    assert (len(digest), name) == (64, "state.json")


def test_choose_a_checkpoint(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 20)
    for step in ("1", "00000001", "step_00000001"):
        assert files.resolve(tmp_path, step) == first
    for step in ("", "latest", "20"):
        assert files.resolve(tmp_path, step) == second
    assert list(files.verify(tmp_path, "1")) == [f"{first}: intact, step 1"]
    assert list(files.verify(tmp_path, "latest")) == [f"{second}: intact, step 20"]
    with pytest.raises(UserError, match=r"from=7: .* of that step; choose one of 1, 20"):
        files.resolve(tmp_path, "7")
    with pytest.raises(UserError, match=r"from=1: .*step_00000001 is one checkpoint; give its run"):
        files.resolve(first, "1")
    with pytest.raises(UserError, match=r"from=1: nowhere has no checkpoint .* none at all"):
        files.resolve("nowhere", "1")


@pytest.mark.parametrize("word", ["8oo", "step800", "step_000000800", "-1", "newest"])
def test_a_word_that_names_no_checkpoint(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path), f"--from={word}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: from={word}: must be latest or a step, as step_00000800 or 800\n"
    )


def test_verify_checks_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3)]
    (folders[0] / "state.json").write_text("{")
    (folders[1] / "weights_stage01.safetensors").unlink()
    for place in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(SystemExit) as stop:
            main(["verify", str(place)])
        captured = capsys.readouterr()
        first, second, third = captured.out.splitlines()
        expected = "damaged (SHA-256 differs from state.json.sha256)"
        assert first == f"{folders[0]}/state.json: {expected}"
        assert second == f"{folders[1]}/weights_stage01.safetensors: missing"
        assert third == f"{folders[2]}: intact, step 3"
        assert stop.value.code == 1
        assert captured.err.startswith(f"error: {place}: 2 of 3 checkpoints damaged; delete ")
        assert captured.err.count("\n") == 1
    main(["verify", str(folders[2])])
    assert capsys.readouterr().out == f"{folders[2]}: intact, step 3\n"
    main(["verify", str(tmp_path), "--from", "3"])
    assert capsys.readouterr().out == f"{folders[2]}: intact, step 3\n"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoints/step_"):
        files.resolve(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        list(files.verify(tmp_path))


def test_a_vanished_run_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.begin_checkpoint(step_folder(tmp_path / "gone", 1))
    assert not (tmp_path / "gone").exists()
