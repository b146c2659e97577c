"""Several Linux hosts on one machine, for tests of a real cluster: they share the network alone.

A host is a set of namespaces (network, mounts, process ids, IPC, host name) held by one process: it
has its own address, loopback, /tmp and /dev/shm, sees its own processes alone, and of the disk what
is kept for it. A virtual cable joins it to a bridge in a namespace of its own. To kill the holder
is to pull the host's plug; to set the cable down is a network cut that nobody is told of. When the
test's process dies, holders die with it, and the kernel removes the rest: nothing is left behind.

Needs Linux, root (or the right to make namespaces) and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

from tests.support.repo import REPO

PORT = 6379
TOKEN = Path("/tmp/ray-token")  # of each host its own file, of equal content
MEGABYTE = 2**20
# What `docs/cluster.md` says to set on every node, so that a cut link is noticed in time.
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "5000"}
KEEPALIVE |= {"RAY_grpc_client_keepalive_timeout_ms": "5000"}

_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
# As process 1 of the host it takes in its orphans, as an init does.
_WAIT = "echo ready; sleep infinity & while :; do wait; done"


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"no {tool} here: apt-get install iproute2 util-linux"
    script = "ip link add name v0 type veth peer name v1 && mount -t tmpfs x /mnt"
    made = subprocess.run([*_UNSHARE, "sh", "-c", script], capture_output=True, text=True)
    return f"no right to make namespaces: {made.stderr.strip()}" if made.returncode else None


class Host:
    """One host; made by `Hosts`."""

    def __init__(self, name: str, ip: str, script: str) -> None:
        self.name, self.ip = name, ip
        self.holder = subprocess.Popen(
            [*_UNSHARE, "bash", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_me,
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {name} did not come up")
        (init,) = psutil.Process(self.holder.pid).children()
        self.pid: int = init.pid

    def command(self, *command: str) -> list[str]:
        """The command as it is run on this host."""
        return ["nsenter", "--target", str(self.pid), "--all", f"--wd={os.sep}", "--", *command]

    def start(
        self, *command: str, log: Path, cwd: Path = Path("/"), variables: Mapping[str, str] = {}
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host, its output going to ``log``."""
        line = f"cd {shlex.quote(str(cwd))} && exec {shlex.join(command)}"
        with open(log, "ab") as output:
            return subprocess.Popen(
                self.command("sh", "-c", line),
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, *command: str, cwd: Path = Path("/"), **variables: str) -> str:
        """Run a command on this host to its good end; its output."""
        line = f"cd {shlex.quote(str(cwd))} && exec {shlex.join(command)}"
        done = subprocess.run(
            self.command("sh", "-c", line),
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """What runs on this host, whoever started it."""

        def host_of(pid: int) -> int | None:
            with contextlib.suppress(OSError):  # it is gone
                return Path(f"/proc/{pid}/ns/pid").stat().st_ino
            return None

        mine, found = host_of(self.pid), []
        for pid in psutil.pids() if mine else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if host_of(pid) == mine:
                    found.append(psutil.Process(pid))
        return found

    def titled(self, *titles: str) -> list[psutil.Process]:
        """The processes whose title begins with one of these."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, IndexError):  # gone, or of no title
                if process.cmdline()[0].startswith(titles):
                    found.append(process)
        return found

    def freeze(self, *titles: str) -> None:
        """Stop the processes of these titles where they are."""
        for process in self.titled(*titles):
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def unplug(self) -> None:
        """Kill the whole host, as a spot instance goes: every process of it, at once."""
        self.holder.kill()
        self.holder.wait()


class Hosts:
    """A switch, and hosts by name that are joined to it.

    Args:
        folder: where the hosts' private files lie.
        names: of the hosts; the first gets the first address.
        keep: what of /tmp and of the repository each host sees, by its name; all see Python's own
            environment, and no other than these files is under those two.
        shm: bytes of /dev/shm.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        keep: Mapping[str, Sequence[Path]],
        shm: int = 512 * MEGABYTE,
    ) -> None:
        self.folder = folder
        self.hosts: dict[str, Host] = {}
        self._names, self._keep, self._shm = names, keep, shm
        self._token = secrets.token_hex(32)

    def __enter__(self) -> Hosts:
        switch = "ip link set lo up; ip link add br0 type bridge; ip link set br0 up"
        self.switch = Host("switch", "", f"{switch}; {_WAIT}")
        try:
            for number, name in enumerate(self._names, 1):
                self._add(name, number)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for host in (*self.hosts.values(), self.switch):
            host.unplug()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def _add(self, name: str, number: int) -> None:
        private = self.folder / name
        (private / "tmp").mkdir(parents=True, exist_ok=True)
        (private / "tmp" / TOKEN.name).write_text(self._token)
        host = Host(name, f"10.77.0.{number}", self._mounts(name, private))
        self.hosts[name] = host
        on_switch = ["nsenter", "--target", str(self.switch.pid), "--net", "ip", "link"]
        cable = f"cable-{number}"
        for command in (
            [*on_switch, "add", cable, "type", "veth", "peer", "name", "eth0",
             "netns", str(host.pid)],
            [*on_switch, "set", cable, "master", "br0", "up"],
        ):  # fmt: skip
            subprocess.run(command, check=True)
        host.run(
            "sh", "-ec",
            f"ip link set lo up; ip addr add {host.ip}/24 dev eth0; ip link set eth0 up; "
            # Never reached: by its default route Ray finds the host's own address.
            "ip route add default via 10.77.0.254",
        )  # fmt: skip

    def _mounts(self, name: str, private: Path) -> str:
        """The script that gives a host its own view of the disk."""
        kept = [Path(sys.prefix), *self._keep.get(name, ())]
        lines = [f"hostname {name}", "mount -t proc proc /proc", "mkdir -p /run/kept"]
        lines += ["mount -t tmpfs kept /run/kept"]
        for number, path in enumerate(kept):  # put aside, before what is above them goes
            lines += [f"mkdir /run/kept/{number}", f"mount --rbind {path} /run/kept/{number}"]
        lines += [f"mount -t tmpfs -o size={self._shm} shm /dev/shm"]
        lines += [f"mkdir /run/kept/tmp; mount --bind {private / 'tmp'} /run/kept/tmp"]
        if not REPO.is_relative_to("/tmp"):
            lines += [f"mount -t tmpfs hidden {REPO}"]
        lines += ["mount --move /run/kept/tmp /tmp"]
        for number, path in enumerate(kept):
            lines += [f"mkdir -p {path}; mount --rbind /run/kept/{number} {path}"]
        lines += [_WAIT]
        return "\n".join(lines)

    def cut(self, name: str) -> None:
        """Take the cable of a host out: its connections go silent, nobody is told."""
        self._cable(name, "down")

    def mend(self, name: str) -> None:
        """Put the cable in again."""
        self._cable(name, "up")

    def _cable(self, name: str, state: str) -> None:
        cable = f"cable-{self.hosts[name].ip.rpartition('.')[2]}"
        link = ["ip", "link", "set", cable, state]
        subprocess.run(["nsenter", "-t", str(self.switch.pid), "--net", *link], check=True)

    def ray_start(self, name: str, head: str, cpus: int, *flags: str, **variables: str) -> None:
        """`ray start` on a host, as `docs/cluster.md` has it; the head is the host of that name."""
        host, address = self.hosts[name], f"{self.hosts[head].ip}:{PORT}"
        where = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if name == head
            else [f"--address={address}"]
        )
        host.start(
            str(Path(sys.prefix) / "bin" / "ray"), "start", *where,
            f"--node-ip-address={host.ip}", f"--num-cpus={cpus}",
            f"--object-store-memory={200 * MEGABYTE}", "--disable-usage-stats", "--block",
            *flags, log=self.folder / f"{name}.log", variables=KEEPALIVE | variables,
        )  # fmt: skip

    def ray_address(self, head: str) -> str:
        """The address of the cluster of that head."""
        return f"{self.hosts[head].ip}:{PORT}"


def environment(**variables: str) -> dict[str, str]:
    """The caller's environment without what is this machine's."""
    ours = ("GPT2_", "DVC_", "RAY_", "PYTHONDONT", "HF_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN)}
    return {**kept, "HOME": "/tmp", "RAY_USAGE_STATS_ENABLED": "0", **auth, **variables}


def wait_for(condition: Callable[[], object], seconds: float = 60, every: float = 0.1) -> float:
    """Wait until it holds; the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not happen"
        time.sleep(every)
    return time.monotonic() - begin


def _die_with_me() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
