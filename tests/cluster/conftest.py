"""What the tests of several hosts share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.checks import SCRIPT, TRAIN
from cluster.hosts import Cluster

from deepmim_scale.data.samples import write_samples


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """As many hosts as the session's option says; all that was made is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hosts"))  # short: sockets have names of 108 bytes
    made = Cluster(folder, request.config.getoption("--hosts"))
    try:
        made.up()
        write_samples(made.clone / "samples")
        yield made
    finally:
        made.down()
        if not request.session.testsfailed:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"what was printed is in {folder}")


@pytest.fixture(scope="session")
def one(cluster: Cluster) -> Path:
    """The run in one process that the others must equal."""
    done = cluster.hosts[0].run("python", SCRIPT, *TRAIN, "--output", "runs/one")
    assert done.code == 0, done.said
    return cluster.clone / "runs" / "one"


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """A test's processes end with it."""
    yield
    for host in cluster.hosts:
        host.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many hosts to make."""
    parser.addoption("--hosts", type=int, default=2)
