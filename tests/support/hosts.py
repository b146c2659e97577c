"""Several Linux hosts on one machine, for tests of a real cluster. They share only the network.

A host is a set of namespaces (network, mounts, process ids, IPC, host name) held by one process. It
has its own address, loopback, /tmp and /dev/shm, sees only its own processes, and sees only the
files that are kept for it. A veth cable connects it to a bridge in another namespace. Killing the
holder is a power failure; setting the cable down is a silent network cut. The holders die with the
test's process, and the kernel removes the rest.

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
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pipeline.cluster.join import NODE_VARIABLES
from tests.support.repo import REPO

PORT = 6379
TOKEN = Path("/tmp/ray-token")  # a file on each host, with the same content
MEGABYTE = 2**20

_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
# Process 1 of the host; like an init it reaps orphans.
_WAIT = "echo ready; sleep infinity & while :; do wait; done"


def unsupported_reason() -> str | None:
    """Return why hosts cannot be made on this machine, or None."""
    if sys.platform != "linux":
        return "needs the network namespaces of Linux"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install iproute2 util-linux"
    script = "ip link add name v0 type veth peer name v1 && mount -t tmpfs x /mnt"
    made = subprocess.run([*_UNSHARE, "sh", "-c", script], capture_output=True, text=True)
    return f"cannot make namespaces: {made.stderr.strip()}" if made.returncode else None


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
            preexec_fn=_die_with_parent,
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {name} did not start")
        (init,) = psutil.Process(self.holder.pid).children()
        self.pid: int = init.pid

    def command(self, *command: str) -> list[str]:
        """Return the command line that runs ``command`` on this host."""
        return ["nsenter", "--target", str(self.pid), "--all", f"--wd={os.sep}", "--", *command]

    def start(
        self, *command: str, log: Path, cwd: Path = Path("/"), variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host; append its output to ``log``."""
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

    def run(self, *command: str) -> str:
        """Run a command on this host, check for status 0, return its output."""
        done = subprocess.run(
            self.command(*command),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def titled(self, *titles: str) -> list[psutil.Process]:
        """Return the processes on this host whose title begins with one of ``titles``."""
        mine, found = Path(f"/proc/{self.pid}/ns/pid").stat().st_ino, []
        for process in psutil.process_iter():
            # It may have ended, or have no title.
            with contextlib.suppress(psutil.Error, OSError, IndexError):
                same_host = Path(f"/proc/{process.pid}/ns/pid").stat().st_ino == mine
                if same_host and process.cmdline()[0].startswith(titles):
                    found.append(process)
        return found

    def freeze(self, *titles: str) -> None:
        """Suspend the processes with these titles."""
        for process in self.titled(*titles):
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def unplug(self) -> None:
        """Kill all processes of the host at once, like the loss of a spot instance."""
        self.holder.kill()
        self.holder.wait()


class Hosts:
    """A switch, and the hosts connected to it, by name.

    Args:
        folder: Folder of the hosts' private files.
        names: Names of the hosts; the first gets the first address.
        keep: Host name -> paths below /tmp and the repository that the host sees. All hosts see
            Python's environment, and nothing else below those two.
        shm: Size of /dev/shm in bytes.
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
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
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
        cable = f"cable-{number}"
        self._link("add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._link("set", cable, "master", "br0", "up")
        host.run(
            "sh", "-ec",
            f"ip link set lo up; ip addr add {host.ip}/24 dev eth0; ip link set eth0 up; "
            # No such router: Ray finds the host's own address by the default route.
            "ip route add default via 10.77.0.254",
        )  # fmt: skip

    def _mounts(self, name: str, private: Path) -> str:
        """Return the script that gives a host its own view of the disk."""
        kept = [Path(sys.prefix), *self._keep.get(name, ())]
        lines = [f"hostname {name}", "mount -t proc proc /proc", "mkdir -p /run/kept"]
        lines += ["mount -t tmpfs kept /run/kept"]
        for number, path in enumerate(kept):  # before the folders above them are hidden
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
        """Set a host's cable down: its connections go silent without being closed."""
        cable = f"cable-{self.hosts[name].ip.rpartition('.')[2]}"
        self._link("set", cable, "down")

    def _link(self, *change: str) -> None:
        """Run `ip link` on the switch."""
        on_switch = ("nsenter", "--target", str(self.switch.pid), "--net", "ip", "link")
        subprocess.run([*on_switch, *change], check=True)

    def ray_start(self, name: str, head: str, cpus: int, *flags: str, **variables: str) -> None:
        """Run `ray start` on a host, as in `docs/cluster.md`; ``head`` is the head's name."""
        host, address = self.hosts[name], self.ray_address(head)
        new = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        where = new if name == head else [f"--address={address}"]
        host.start(
            str(Path(sys.prefix) / "bin" / "ray"), "start", *where,
            f"--node-ip-address={host.ip}", f"--num-cpus={cpus}",
            f"--object-store-memory={200 * MEGABYTE}", "--disable-usage-stats", "--block",
            *flags, log=self.folder / f"{name}.log", variables=NODE_VARIABLES | variables,
        )  # fmt: skip

    def ray_address(self, head: str) -> str:
        """Return the address of the cluster with this head."""
        return f"{self.hosts[head].ip}:{PORT}"


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without this machine's settings, plus ``variables``."""
    ours = ("GPT2_", "DVC_", "RAY_", "PYTHONDONT", "HF_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN)}
    return {**kept, "HOME": "/tmp", "RAY_USAGE_STATS_ENABLED": "0", **auth, **variables}


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
