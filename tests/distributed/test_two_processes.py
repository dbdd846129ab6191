"""ZeRO-2 over two real gloo processes: bit-equal local backward, equality with one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("two") / "out.json"
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(out)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def test_local_backward_equals_joint_under_the_engine(measured: dict[str, Any]) -> None:
    found = measured["check_local_equals_joint"]
    assert found == dict.fromkeys(found, True)
    assert len(found) == 4


@pytest.mark.parametrize("reduction", ["coalesced", "per_microbatch"])
def test_equals_one_process(measured: dict[str, Any], reduction: str) -> None:
    found = measured["check_equals_one_process"][reduction]
    assert found["difference"] <= 1e-6
    norms, expected = found["norms"]
    assert norms == pytest.approx(expected, rel=1e-6)
    owners, expected_owners = found["owners"]
    assert owners == pytest.approx(expected_owners, rel=1e-5)
    assert set(owners) == {"encoder", "block03", "block06", "block09", "block12"}


def test_optimizer_state_moves_to_a_fresh_engine(measured: dict[str, Any]) -> None:
    assert measured["check_state_round_trip"] == {"state": True, "next step": True, "moved": True}


@pytest.mark.parametrize("precision", ["fp32", "float16"])
def test_overflow_is_voted(measured: dict[str, Any], precision: str) -> None:
    first, second = measured["check_overflow"][precision]
    assert first == second, "the two ranks disagree"
    assert first["applied"] == [True, False, True]
    assert first["kept"] == [False, True, False]
    scale = 65536.0 if precision == "float16" else 1.0
    after = scale / 2 if precision == "float16" else 1.0
    assert first["scales"] == [scale, scale, after, after]


def test_contract_of_deepspeed(measured: dict[str, Any]) -> None:
    """zero.py must set the boundary before step(), and counts its backward calls."""
    assert measured["check_silent_traps"] == {
        "step without boundary does nothing": True,
        "miscount passes": False,
    }


def test_updated_weights_travel_as_autocast_would_round_them(measured: dict[str, Any]) -> None:
    found = measured["check_weight_gather"]
    assert found == dict.fromkeys(found, True)
    assert len(found) == 6


def test_unequal_parameter_groups_are_refused(measured: dict[str, Any]) -> None:
    assert "parameter groups per rank [2, 1]" in measured["check_unequal_groups"]
