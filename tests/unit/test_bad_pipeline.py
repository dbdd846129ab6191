"""Pipelines that cannot be: one line with key, value and remedy, exit code 2, no process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from deepmim_scale.train.pretrain import main

DEEPMIM, MAE, MIRL = ("--preset", "debug"), ("--preset", "debug_mae"), ("--preset", "debug_mirl")
TWO = (*DEEPMIM, "--stages", "2")
# Processes, words, and how the line begins
CASES: dict[str, tuple[int | None, tuple[str, ...], str]] = {
    "stages and processes": (
        4,
        (*DEEPMIM, "--stages", "3"),
        "stages=3: must divide the 4 processes; change --stages or the launcher's number",
    ),
    "more stages than processes": (
        2,
        (*DEEPMIM, "--stages", "4"),
        "stages=4: must divide the 2 processes; change --stages",
    ),
    "stages without a launcher": (None, TWO, "stages=2: must divide the 1 process;"),
    "no stages": (1, (*DEEPMIM, "--stages", "0"), "stages=0: must be positive"),
    "deeper than the model": (
        13,
        (*DEEPMIM, "--stages", "13"),
        "stages=13: deepmim with placement=linear and depth=12 can be cut into 1 to 12 stages",
    ),
    "too few blocks": (
        2,
        (*TWO, "--layout", "6d|5d"),
        "layout=6d|5d: adds up to 11 blocks in 2 stages; must be depth=12",
    ),
    "too few stages": (
        2,
        (*TWO, "--layout", "3d3d3d3d"),
        "layout=3d3d3d3d: has 1 stages, but stages=2 with placement=linear needs 2; change one",
    ),
    "empty stage": (
        2,
        (*TWO, "--layout", "0|3d3d3d3d"),
        "layout=0|3d3d3d3d: adds up to 12 blocks in 2 stages; must be depth=12 with at least one",
    ),
    "decoders elsewhere": (
        2,
        (*TWO, "--layout", "6d|6d"),
        "layout=6d|6d: decoders after blocks [6, 12], but taps=[3, 6, 9, 12]; write 3d3d/3d3d",
    ),
    "no layout": (
        2,
        (*TWO, "--layout", "half"),
        "layout=half: 'half' is no stage; write numbers of blocks",
    ),
    "mirl's segments": (
        2,
        (*MIRL, "--stages", "2", "--layout", "2d2d2d2d|2d2d"),
        "layout=2d2d2d2d|2d2d: mirl needs equal runs of segments; leave layout out",
    ),
    "dib_w per micro-batch": (
        2,
        (*TWO, "--schedule", "dib_w", "--reduction", "per_microbatch"),
        (
            "reduction=per_microbatch: schedule=dib_w leaves weight gradients for later and needs "
            "reduction=overlapped; or use schedule=dib"
        ),
    ),
    "mirl in 4": (
        4,
        (*MIRL, "--stages", "4"),
        "stages=4: mirl with placement=linear and depth=12 can be cut into 1, 2, 3, 6 stages",
    ),
    "mirl folded in 6": (
        6,
        (*MIRL, "--stages", "6", "--placement", "v"),
        "stages=6: mirl with placement=v and depth=12 can be cut into 1, 3 stages; use one",
    ),
    "mirl dib_w": (
        3,
        (*MIRL, "--stages", "3", "--schedule", "dib_w"),
        "schedule=dib_w: mirl is defined for schedule gpipe, 1f1b, dib; use one of these",
    ),
    "deepmim folded": (
        2,
        (*TWO, "--placement", "v"),
        "placement=v: deepmim is defined for placement linear; use one of these",
    ),
    "mae folded": (
        2,
        (*MAE, "--stages", "2", "--placement", "v"),
        "placement=v: mae is defined for placement linear; use one of these",
    ),
    "local, no decoder at the end": (
        2,
        (*TWO, "--gradient-flow", "local", "--layout", "3d1|2d3d3d"),
        (
            "gradient_flow=local: layout 3d1/2d3d3d has blocks that no loss of their stage "
            "reaches; end every stage with a decoder"
        ),
    ),
    "local mae": (
        2,
        (*MAE, "--stages", "2", "--gradient-flow", "local"),
        "gradient_flow=local: mae has blocks without a loss of their own stage; use gradient_flow",
    ),
    "no time": (1, (*DEEPMIM, "--timeout", "0"), "timeout=0.0: must be positive"),
}


def test_blocking_launches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(SystemExit) as stop:
        main([*TWO, "--data", str(tmp_path), "--output", str(tmp_path / "run")])
    assert stop.value.code == 2
    expected = "error: stages=2: never end under CUDA_LAUNCH_BLOCKING; unset it, or use --stages 1"
    assert capsys.readouterr().err == f"{expected}\n"


@pytest.mark.parametrize("name", CASES)
def test_pipeline(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, words, expected = CASES[name]
    if processes is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as stop:
        main([*words, "--data", str(tmp_path), "--output", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith(f"error: {expected}")
    assert captured.err.count("\n") == 1, f"not one line: {captured.err}"
    assert captured.out == ""
    assert not dist.is_initialized()
    assert not (tmp_path / "run").exists()
