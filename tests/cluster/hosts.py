"""Hosts on one machine: namespaces on a bridge of their own, with an SSH server in each.

A host has its own network, processes, name, shared memory and mounts; files are the machine's.
Its own processes are essential: on Ctrl-C DeepSpeed ends every launcher that it can see on a host.
Nothing of the machine is touched: /etc and /run are covered inside the hosts only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "dms"
HEADER_BYTES = 66  # Ethernet, IP and TCP with time stamps, of each packet
INIT = """
set -e
hostname {name}
mount -t sysfs sysfs /sys
mount -t tmpfs none /sys/fs/cgroup
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh/client /etc/ssh/ssh_config
sysctl -qw net.ipv4.tcp_congestion_control=cubic || true
/usr/sbin/sshd -D -e -f {folder}/ssh/server &
touch {folder}/{name}.ready
while :; do sleep 1000 & wait -n || true; done
"""
CLIENT = """Host *
  IdentityFile {folder}/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SERVER = """HostKey {folder}/ssh/host_key
AuthorizedKeysFile {folder}/ssh/id.pub
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
"""


def sh(*words: str, check: bool = True) -> str:
    """What a command of the machine prints."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_for(
    what: Callable[[], object], seconds: float, message: str = "", every: float = 0.05
) -> None:
    """Return once `what` is true; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, message or "not seen in time"
        time.sleep(every)


class Host:
    """One of the cluster's hosts."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number, self.name = cluster, number, f"node{number}"
        self.namespace = f"{cluster.prefix}n{number}"
        self._outer: subprocess.Popen[bytes] | None = None
        self.init = 0
        """Its first process, as the machine numbers it."""

    def boot(self) -> None:
        """Start, also after a power-off."""
        folder = self.cluster.folder
        ready = folder / f"{self.name}.ready"
        ready.unlink(missing_ok=True)
        # All of a host ends with its first process, and that with this one.
        new = ["unshare", "-m", "-u", "-i", "-p", "--fork", "--kill-child", "--mount-proc"]
        with (folder / f"{self.name}.log").open("ab") as log:
            self._outer = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{self.namespace}"),
                    *("setpriv", "--pdeathsig", "KILL", *new, "--propagation", "private"),
                    *("bash", "-c", INIT.format(name=self.name, folder=folder)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        log_text = (folder / f"{self.name}.log").read_text
        wait_for(ready.exists, 30, log_text())
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        self.init = int(children.read_text().split()[0])

    def inside(self, *words: str) -> list[str]:
        """The command line that does `words` on this host, in the clone."""
        script = f"cd {shlex.quote(str(self.cluster.clone))} && exec " + '"$@"'
        enter = ["nsenter", "-t", str(self.init), "-m", "-u", "-i", "-n", "-p", "--"]
        return [*enter, "bash", "-c", script, "_", *words]

    def start(self, *words: str, **environment: str) -> Command:
        """Begin a command."""
        return Command(self, words, environment)

    def run(self, *words: str, seconds: float = 300, **environment: str) -> Command:
        """Do a command; AssertionError if it takes longer."""
        command = self.start(*words, **environment)
        command.wait(seconds)
        return command

    def shell(self, text: str, seconds: float = 300, **environment: str) -> Command:
        """Do a line as a user types it."""
        return self.run("bash", "-c", text, seconds=seconds, **environment)

    def processes(self, text: str = "") -> dict[int, str]:
        """Number and command line of the processes whose line has `text`."""
        found = {}
        for pid in map(int, sh("ip", "netns", "pids", self.namespace, check=False).split()):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if text in line:
                    found[pid] = line
        return found

    def ranks(self) -> list[int]:
        """The training processes; launchers have the script in their lines, too."""
        launchers = (
            "deepspeed.launcher",
            "bin/torchrun",
            "bin/deepspeed",
            "nsenter",
            "pdsh",
            "ssh",
        )
        return [
            pid
            for pid, line in self.processes("pretrain.py").items()
            if not any(word in line for word in (*launchers, "bash", "srun", "slurm"))
        ]

    def clear(self) -> None:
        """End all that tests left running."""
        keep = ("sshd -D", "sleep 1000", "slurm", "munged")
        for pid, line in self.processes().items():
            if pid != self.init and not any(word in line for word in keep):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def link(self, state: str) -> None:
        """Plug the cable in ("up") or out ("down")."""
        sh("ip", "-n", self.cluster.switch, "link", "set", f"p{self.number}", state)

    def power_off(self) -> None:
        """All at once: nobody says good-bye to the other hosts."""
        self.link("down")
        self.kill()

    def kill(self) -> None:
        """End all of the host."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait()
            self._outer = None

    def signal_all(self, number: signal.Signals) -> None:
        """SIGSTOP freezes the host, SIGCONT thaws it."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def lose(self, permille: int) -> None:
        """Drop so many of a thousand packets that arrive; 0 ends it."""
        enter = ["ip", "netns", "exec", self.namespace, "nft"]
        sh(*enter, "delete", "table", "inet", "lossy", check=False)
        if permille:
            rule = f'iifname "eth0" numgen random mod 1000 < {permille} drop'
            chain = f"chain i {{ type filter hook prerouting priority -300; {rule}; }};"
            sh(*enter, f"table inet lossy {{ {chain} }}")

    def shape(self, rate: str) -> None:
        """Limit what leaves and what arrives, as `20mbit`; empty ends it."""
        for words in (
            ["-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root"],
            ["-n", self.cluster.switch, "qdisc", "replace", "dev", f"p{self.number}", "root"],
        ):
            kind = ["tbf", "rate", rate, "burst", "64k", "limit", "256k"] if rate else ["pfifo"]
            sh("tc", *words, *kind)

    def payload(self) -> tuple[int, int]:
        """Bytes sent and received by its card so far, without packets' headers."""
        text = sh("ip", "-n", self.namespace, "-s", "-j", "link", "show", "eth0")
        counts = json.loads(text)[0]["stats64"]
        sent, received = (
            counts[way]["bytes"] - HEADER_BYTES * counts[way]["packets"] for way in ("tx", "rx")
        )
        return sent, received


class Command:
    """A command on a host; what it prints goes to a file."""

    def __init__(self, host: Host, words: Sequence[str], environment: dict[str, str]) -> None:
        cluster = host.cluster
        cluster.count += 1
        self._log = cluster.folder / f"command{cluster.count:03d}.log"
        self.line = f"{host.name}: {shlex.join(words)}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                host.inside(*words),
                env=cluster.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    @property
    def said(self) -> str:
        """All that it printed so far."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit code; AssertionError if it takes longer."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(
                f"{self.line}: still there after {seconds} s:\n{self.said}"
            ) from None


class Cluster:
    """Some hosts and the switch between them."""

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder, self.count = folder, 0
        self.prefix = f"{PREFIX}{os.getpid()}"
        self.switch = f"{self.prefix}sw"
        self.clone = folder / "clone"
        self.hosts = [Host(self, number) for number in range(1, num_hosts + 1)]
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.clone}:{self.clone / 'kernels'}",
            # As launcher/environment.sh has it.
            "OMP_NUM_THREADS": "1",
            "DS_ENV_FILE": str(self.clone / "launcher" / "deepspeed_env"),
            "HOME": str(folder),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
            self.environment.pop(name, None)

    def up(self) -> None:
        """Make keys, switch and hosts."""
        remove_left()
        ssh = self.folder / "ssh"
        ssh.mkdir()
        for name in ("id", "host_key"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name))
        (ssh / "client").write_text(CLIENT.format(folder=self.folder))
        (ssh / "server").write_text(SERVER.format(folder=self.folder))
        names = [f"10.77.0.{host.number} {host.name}" for host in self.hosts]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        # A folder of its own to start from; edits in the repository do not meet these runs.
        for name in ("deepmim_scale", "kernels", "launcher", "ds_configs"):
            shutil.copytree(ROOT / name, self.clone / name)
        for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
            shutil.copy2(ROOT / name, self.clone / name)  # older than what they made
        sh("ip", "netns", "add", self.switch)
        sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self.switch, "link", "set", "br0", "up")
        for host in self.hosts:
            self._plug_in(host)
            host.boot()

    def _plug_in(self, host: Host) -> None:
        port, inner, switch = f"p{host.number}", host.namespace, self.switch
        sh("ip", "netns", "add", inner)
        pair = ["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", inner]
        sh("ip", "-n", switch, *pair)
        sh("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        sh("ip", "-n", inner, "addr", "add", f"10.77.0.{host.number}/24", "dev", "eth0")
        for card in ("lo", "eth0"):
            sh("ip", "-n", inner, "link", "set", card, "up")
        # A packet is a packet then; else 64 KB are counted, delayed or lost as one.
        off = ["tso", "off", "gso", "off", "gro", "off"]
        sh("ip", "netns", "exec", inner, "ethtool", "-K", "eth0", *off)
        sh("ip", "netns", "exec", switch, "ethtool", "-K", port, *off)

    def down(self) -> None:
        """Remove all that `up` made, but for the files."""
        for host in self.hosts:
            host.kill()
        for name in _namespaces():
            if name.startswith(self.prefix):
                sh("ip", "netns", "del", name, check=False)

    def hostfile(self, slots: int, num_hosts: int = 2) -> str:
        """A hostfile for some processes on each host."""
        path = self.folder / f"hosts{num_hosts}x{slots}"
        lines = [f"{host.name} slots={slots}\n" for host in self.hosts[:num_hosts]]
        path.write_text("".join(lines))
        return str(path)


def _namespaces() -> Iterator[str]:
    for line in sh("ip", "netns", "list", check=False).splitlines():
        yield line.split()[0]


def remove_left() -> None:
    """Remove namespaces of sessions that were killed."""
    for name in _namespaces():
        number = name.removeprefix(PREFIX).rstrip("sw").split("n")[0]
        if name.startswith(PREFIX) and number.isdigit() and not Path(f"/proc/{number}").exists():
            sh("ip", "netns", "del", name, check=False)


def why_not() -> str:
    """Why there can be no hosts on this machine; empty where there can."""
    if os.geteuid():
        return "network namespaces need root"
    name = f"{PREFIX}{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    sh("ip", "netns", "del", name)
    return ""
