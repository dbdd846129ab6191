"""The map from hosts and GPUs to stages and replicas is the processes' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepmim_scale.cli import main
from deepmim_scale.errors import UserError
from deepmim_scale.plan.rank_map import places, read_hostfile


@pytest.mark.parametrize(("slots", "stages"), [((2, 2), 2), ((1, 3, 2), 3), ((4,), 4), ((3,), 1)])
def test_places(slots: tuple[int, ...], stages: int) -> None:
    hosts = {f"node{number}": count for number, count in enumerate(slots)}
    found = places(hosts, stages)
    replicas = sum(slots) // stages
    assert [place.rank for place in found] == list(range(sum(slots)))
    # parallel/grid.py: rank = stage * replicas + replica
    assert all(place.rank == place.stage * replicas + place.replica for place in found)
    assert {(place.stage, place.replica) for place in found} == {
        (stage, replica) for stage in range(stages) for replica in range(replicas)
    }
    for host, count in hosts.items():
        assert [place.gpu for place in found if place.host == host] == list(range(count))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two of them\nnode1 slots=2\n\nnode2 slots=2\n")
    main(["ranks", "--hostfile", str(file), "--", "--preset", "debug", "--stages", "2"])
    assert capsys.readouterr().out.splitlines() == [
        "node1: GPU 0-1 -> stage 0, replica 0-1 (rank 0-1)",
        "node2: GPU 0-1 -> stage 1, replica 0-1 (rank 2-3)",
    ]
    main(["ranks", "--hosts", "a,b", "--gpus-per-node", "1", "--", "RUN"])
    assert capsys.readouterr().out.splitlines()[1] == "b: GPU 0 -> stage 0, replica 1 (rank 1)"


def test_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("node1\n")
    with pytest.raises(UserError, match="node1: write each line as `node1 slots=8`"):
        read_hostfile(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(str(tmp_path / "none"))
    with pytest.raises(UserError, match="stages=3: must divide the 4 processes"):
        places({"a": 4}, 3)
