"""Slurm on the hosts of a cluster: munge once, the controller on node1, a daemon on every host."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from cluster.hosts import Cluster, Command, wait_for

GPUS = 2
CONFIG = """ClusterName=checks
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
StateSaveLocation={folder}/slurm/state
SlurmdSpoolDir={folder}/slurm/%n
SlurmctldPidFile={folder}/slurm/controller.pid
SlurmdPidFile={folder}/slurm/%n.pid
SlurmctldLogFile={folder}/slurm/controller.log
SlurmdLogFile={folder}/slurm/%n.log
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=60
MinJobAge=3600
SlurmdTimeout=20
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{count}] CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """A Slurm of its own; nothing of it lies outside the cluster's folder and hosts."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.folder = cluster, cluster.folder / "slurm"
        cluster.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def up(self) -> None:
        """Start all daemons and wait until every host is idle."""
        cluster, folder = self.cluster, self.folder
        names = [host.name for host in cluster.hosts]
        for name in ("state", *names):
            (folder / name).mkdir(parents=True)
        values = {"folder": cluster.folder, "count": len(names), "gpus": GPUS}
        (folder / "slurm.conf").write_text(CONFIG.format(**values))
        # Slurm of 2022 knows no machine without these; null devices stand for GPUs.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(GPUS):
            os.mknod(folder / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        self._start_munge()
        configuration = str(folder / "slurm.conf")
        first = cluster.hosts[0]
        done = first.run("setsid", "-f", "slurmctld", "-f", configuration, "-c", seconds=30)
        assert done.code == 0, done.said
        for host in cluster.hosts:
            self.join(host.name)
        self.wait_idle()

    def _start_munge(self) -> None:
        """A socket is a file: one daemon serves all hosts."""
        munge = self.cluster.folder / "munge"
        munge.mkdir(mode=0o711)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        names = ("socket", "pid", "log", "seed", "key")
        words = ["--socket", "--pid-file", "--log-file", "--seed-file", "--key-file"]
        files = [f"{word}={munge / name}" for word, name in zip(words, names, strict=True)]
        subprocess.run(["munged", "--force", *files], check=True, capture_output=True, timeout=30)

    def join(self, name: str) -> None:
        """Start a host's daemon, also after a power-off."""
        (host,) = [host for host in self.cluster.hosts if host.name == name]
        configuration = str(self.folder / "slurm.conf")
        done = host.run("setsid", "-f", "slurmd", "-f", configuration, "-N", name, seconds=30)
        assert done.code == 0, done.said

    def down(self) -> None:
        """End what does not end with the hosts."""
        pid = self.cluster.folder / "munge" / "pid"
        if pid.is_file():
            os.kill(int(pid.read_text()), signal.SIGTERM)

    def do(self, *words: str) -> str:
        """What a Slurm command prints on node1."""
        done = self.cluster.hosts[0].run(*words, seconds=60)
        assert done.code == 0, f"{done.line}: {done.said}"
        return done.said.strip()

    def shell(self, text: str) -> Command:
        """A line as a user types it on the login node."""
        return self.cluster.hosts[0].shell(text)

    def wait_idle(self) -> None:
        """Until every host waits for work."""
        count = len(self.cluster.hosts)
        wait_for(lambda: self._num_idle() == count, 120, "hosts are not idle", every=0.5)

    def _num_idle(self) -> int:
        done = self.cluster.hosts[0].run(
            "sinfo", "-h", "-p", "main", "-N", "-t", "idle", seconds=60
        )
        return len(done.said.splitlines()) if done.code == 0 else 0

    def state(self, job: str) -> str:
        """As RUNNING, PENDING, COMPLETED, FAILED."""
        found = re.search(r"JobState=(\S+)", self.do("scontrol", "show", "job", job))
        return found[1] if found else ""

    def restarts(self, job: str) -> int:
        """How often a job was put into the queue again."""
        found = re.search(r"Restarts=(\d+)", self.do("scontrol", "show", "job", job))
        return int(found[1]) if found else 0

    def start_now(self, job: str) -> None:
        """A job that was requeued waits for two minutes, otherwise."""
        self.wait_state(job, "PENDING", 120)
        self.do("scontrol", "update", f"jobid={job}", "starttime=now")

    def wait_state(self, job: str, state: str, seconds: float = 300) -> None:
        """Until a job is in a state."""
        wait_for(lambda: self.state(job) == state, seconds, f"job {job} is not {state}", every=0.5)


def output_of(cluster: Cluster, job: str) -> str:
    """What a job printed so far."""
    path = Path(cluster.clone) / f"slurm-{job}.out"
    return path.read_text(errors="replace") if path.is_file() else ""
