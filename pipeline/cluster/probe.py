"""Checks of every node before it works: versions, this project's code, and the shared files.

The driver's values, a `Probe`, reach the nodes in the environment of the job's workers. All nodes
of the cluster compare them at the start; a node that an autoscaler adds later compares them in the
first task of each worker.
"""

import contextlib
import fcntl
import functools
import hashlib
import inspect
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.store.store import Store

PACKAGE = Path(__file__).parents[1]
"""The folder of the package `pipeline`, whose code runs on the nodes."""
DISTRIBUTIONS = ("ray", "tiktoken", "gigatoken")
"""Those that could change a byte of the result, or stop the job from running at all."""
VARIABLE = "PIPELINE_PROBE"
_TIMEOUT = 120.0
_NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Probe:
    """The driver's values, which every node must match."""

    versions: dict[str, str]
    """Of Python, the distributions, and this project's code."""
    store: str = ""
    """Folder of the store; empty if the nodes share nothing."""
    nonce: str = ""
    """Name of a folder that the driver has just made in the store."""
    files: tuple[tuple[str, int], ...] = ()
    """Files that the tasks read, and their sizes in bytes."""

    @property
    def folder(self) -> Path:
        """Folder in which the driver and the nodes write a file each."""
        return Path(self.store) / "tmp" / f"probe-{self.nonce}"


def versions(package: Path = PACKAGE) -> dict[str, str]:
    """Return the versions on this node; the code's is a hash of all modules below ``package``."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = _NOT_INSTALLED
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    found["this project's code"] = digest.hexdigest()[:12]
    return found


@contextlib.contextmanager
def open_probe(store: Store | None, files: Sequence[Path]) -> Iterator[Probe]:
    """Yield a probe of this machine; its folder in the store exists as long as the block runs.

    Args:
        store: Store that the tasks write into; None if the nodes share nothing.
        files: Files that the tasks read; only the first and the last are checked.
    """
    if store is None:
        yield Probe(versions())
        return
    ends = {str(path.absolute()): path.stat().st_size for path in (*files[:1], *files[-1:])}
    nonce = uuid.uuid4().hex
    probe = Probe(versions(), str(store.root), nonce, tuple(ends.items()))
    lock = store.root / "locks" / probe.folder.name
    try:
        with store.lock("probe", nonce):  # keeps `Store.sweep` from removing the folder
            probe.folder.mkdir(parents=True)
            (probe.folder / "driver").write_text(nonce)
            yield probe
    finally:
        shutil.rmtree(probe.folder, ignore_errors=True)
        lock.unlink(missing_ok=True)


def compare(probe: Probe, reply: str = "") -> tuple[list[str], list[str]]:
    """Compare this node with the driver; return errors and warnings, a few words each.

    Args:
        reply: Name of the file that this node writes into the probe's folder; empty: none.
    """
    errors, warnings = [], []
    for name, found in versions().items():
        if found != (expected := probe.versions.get(name, _NOT_INSTALLED)):
            errors.append(f"{name}: {found} here, {expected} on the driver")
    if probe.store:
        try:
            if (probe.folder / "driver").read_text() != probe.nonce:
                raise FileNotFoundError
            if reply:
                (probe.folder / reply).write_text(probe.nonce)
        except OSError as error:
            reason = error.strerror or "a different folder"
            return [*errors, f"{probe.store}: not shared with the driver ({reason})"], []
        if _can_lock(Path(probe.store) / "locks" / probe.folder.name):
            warnings.append("file locks do not reach it: run one pipeline at a time on this store")
    for path, size in probe.files:
        try:
            if (found_size := Path(path).stat().st_size) != size:
                errors.append(f"{path}: {found_size:,} bytes here, {size:,} on the driver")
        except OSError as error:
            errors.append(f"{path}: {error.strerror}")
    return errors, warnings


def _can_lock(path: Path) -> bool:
    """Return whether this node gets the lock that the driver holds."""
    with contextlib.suppress(OSError), open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def check_nodes(probe: Probe) -> None:
    """Have every node that can run tasks compare itself with the driver.

    Raises:
        UserError: Names each node that differs, and how, on one line.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(compare)
    nodes: dict[Any, dict[str, Any]] = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            affinity = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            on_node = task.options(name="probe", scheduling_strategy=affinity)
            nodes[on_node.remote(probe, node["NodeID"])] = node
    failures: list[str] = []
    deadline = time.monotonic() + _TIMEOUT
    for reference, node in nodes.items():
        address = node["NodeManagerAddress"]
        try:
            errors, warnings = ray.get(reference, timeout=max(0, deadline - time.monotonic()))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
            continue  # lost since, before it had any work
        except ray.exceptions.GetTimeoutError:
            failures.append(f"{address} does not answer")
            continue
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"node {address} cannot run this project: {reason}") from None
        if probe.store and not errors and not (probe.folder / node["NodeID"]).exists():
            errors.append(f"{probe.store}: files written there do not appear on the driver")
        if errors:
            failures.append(f"{address} ({', '.join(errors)})")
        for warning in warnings:
            print(f"warning: node {address}: {warning}", flush=True)
    if failures:
        raise UserError(_message(probe, failures))


def with_node_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a task that first calls `check_this_node`."""
    if inspect.isgeneratorfunction(function):

        def stream(*args: Any) -> Iterator[Any]:
            check_this_node()
            # Not `yield from`: Ray sends values into the generator that an inner one may not take.
            for value in function(*args):  # noqa: UP028
                yield value

        return stream

    def call(*args: Any) -> Any:
        check_this_node()
        return function(*args)

    return call


@functools.cache
def check_this_node() -> None:
    """Compare this worker's node with the driver, once in the worker's life.

    Raises:
        UserError: They differ.
    """
    if encoded := os.environ.get(VARIABLE):
        probe = decode(encoded)
        if errors := compare(probe)[0]:
            raise UserError(_message(probe, [f"{socket.gethostname()} ({', '.join(errors)})"]))


def encode(probe: Probe) -> str:
    """Return the probe as the value of an environment variable."""
    return json.dumps(asdict(probe))


def decode(text: str) -> Probe:
    """Return the probe that was encoded by `encode`."""
    values = json.loads(text)
    return Probe(**values | {"files": tuple((path, size) for path, size in values["files"])})


def _message(probe: Probe, failures: Sequence[str]) -> str:
    fix = "install constraints.txt on them"
    if probe.store:
        fix += ", and share the same folders at the same paths or set data: ship in machine.yaml"
    return f"cluster nodes differ from the driver: {'; '.join(failures)}; {fix}"
