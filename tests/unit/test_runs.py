"""Whether a command may go on in a folder, and what a killed run leaves in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.presets import load_preset
from deepmim_scale.runs.folder import METRICS, check_output, read_metrics, write_config


def run(output: Path, **values: Any) -> RunConfig:
    return load_preset("debug").replace(output=str(output), **values)


def begun(output: Path, **values: Any) -> None:
    write_config(run(output, **values))
    (output / METRICS).write_text('{"step": 1}\n')


def test_a_run_that_took_no_step_may_be_replaced(tmp_path: Path) -> None:
    write_config(run(tmp_path, seed=1))
    assert not check_output(run(tmp_path, seed=2))
    begun(tmp_path, seed=1)
    assert check_output(run(tmp_path, seed=1))
    with pytest.raises(UserError, match=r"holds another run \(seed 1 -> 2\)"):
        check_output(run(tmp_path, seed=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        check_output(run(tmp_path / "other"))


def test_stages_are_free_unless_gradients_stop_at_them(tmp_path: Path) -> None:
    begun(tmp_path / "full", stages=2)
    assert check_output(run(tmp_path / "full", stages=4))
    begun(tmp_path / "local", stages=2, gradient_flow="local")
    with pytest.raises(UserError, match="stages 2 -> 4"):
        check_output(run(tmp_path / "local", stages=4, gradient_flow="local"))


@pytest.mark.parametrize("end", ["", "{", '{"step": 3'])
def test_an_unfinished_last_row_is_dropped(tmp_path: Path, end: str) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n' + end)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output=.*file/run/config\.json: cannot be written"):
        write_config(run(tmp_path / "file" / "run"))
