"""`make test-cluster` and `make test-slurm`: packages, hosts, checks, and a last line that counts.

Apart from `make test`, because it takes root, a kernel with namespaces and Debian's packages.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# A program of each package.
PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "nft": "nftables",
    "ethtool": "ethtool",
    "nsenter": "util-linux",
}
SLURM_PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
SLURM_PROGRAMS |= {"munged": "munge"}
# (name in the last line, hosts, file of checks)
SESSIONS = {"cluster": ("hosts 2", 2, "hosts"), "slurm": ("slurm", 3, "slurm")}


class Counter:
    """Counts how checks end."""

    def __init__(self) -> None:
        self.ends = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ends[report.outcome] += 1


def install(programs: dict[str, str]) -> str:
    """Install what is missing and say so; returns why that failed."""
    path = "/usr/sbin:/sbin:/usr/bin:/bin"
    missing = [package for name, package in programs.items() if not shutil.which(name, path=path)]
    if not missing:
        return ""
    if not shutil.which("apt-get"):
        return f"install {' '.join(missing)}"
    print(f"installing {' '.join(missing)}", flush=True)
    options = ["install", "--yes", "--no-install-recommends"]
    for words in (["update"], [*options, *missing]):
        done = subprocess.run(["apt-get", "-qq", *words], check=False)
        if done.returncode:
            return f"apt-get {' '.join(words)} failed"
    return ""


def main(session: str) -> int:
    """Run one of the sessions; 0 if at least one check passed and none ended otherwise."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # hosts are removed then, too
    name, num_hosts, checks = SESSIONS[session]
    sys.path.insert(0, str(HERE.parent))
    from cluster.hosts import why_not

    problem = install(PROGRAMS | (SLURM_PROGRAMS if session == "slurm" else {})) or why_not()
    counter = Counter()
    words = [str(HERE / f"check_{checks}.py"), "--hosts", str(num_hosts), *sys.argv[2:]]
    shown = ["-q", "-s", "--durations=0"]
    code = 1 if problem else int(pytest.main([*words, *shown], plugins=[counter]))
    ends = [f"{count} {end}" for end, count in counter.ends.items() if count or end == "passed"]
    print(f"{name}: {', '.join(ends)}{f' ({problem})' if problem else ''}", flush=True)
    return code or int(not counter.ends["passed"] or counter.ends["skipped"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
