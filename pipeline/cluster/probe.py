"""What is asked of every node before it works: the driver's versions, its code, and its files.

The probe travels in the environment of the job's workers. All nodes of the cluster are asked at the
start; a node that an autoscaler adds later is asked by the first task of each of its workers.
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

# What could change a byte of the result, or keep the job from running at all.
PACKAGES = ("ray", "tiktoken", "gigatoken")
VARIABLE = "PIPELINE_PROBE"
_SECONDS = 120.0
_ABSENT = "no"


@dataclass(frozen=True)
class Probe:
    """What a node should find."""

    versions: dict[str, str]
    """Of Python, the packages, and this project's code."""
    store: str = ""
    """The store's folder; empty where nothing is shared."""
    nonce: str = ""
    """Names a folder in the store that the driver made just now."""
    files: tuple[tuple[str, int], ...] = ()
    """Files that the tasks read, and their bytes."""

    @property
    def folder(self) -> Path:
        """Where the driver and the nodes leave their marks."""
        return Path(self.store) / "tmp" / f"probe-{self.nonce}"


def versions() -> dict[str, str]:
    """What runs here."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = _ABSENT
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]  # all of it: every room works on the nodes
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    found["this project's code"] = digest.hexdigest()[:12]
    return found


@contextlib.contextmanager
def probing(store: Store | None, files: Sequence[Path]) -> Iterator[Probe]:
    """A probe for the length of the block: of the versions, and of what is shared, if anything is.

    Args:
        store: into which the tasks write; None where nothing is shared.
        files: which the tasks read; the first and the last of them are looked at.
    """
    if store is None:
        yield Probe(versions())
        return
    ends = {str(path.absolute()): path.stat().st_size for path in (*files[:1], *files[-1:])}
    nonce = uuid.uuid4().hex
    probe = Probe(versions(), str(store.root), nonce, tuple(ends.items()))
    lock = store.root / "locks" / probe.folder.name
    try:
        with store.lock("probe", nonce):  # and so nobody sweeps the folder away
            probe.folder.mkdir(parents=True)
            (probe.folder / "driver").write_text(nonce)
            yield probe
    finally:
        shutil.rmtree(probe.folder, ignore_errors=True)
        lock.unlink(missing_ok=True)


def complaints(probe: Probe, mark: str = "") -> tuple[list[str], list[str]]:
    """What is wrong here, and what may be: each a few words.

    Args:
        mark: the name under which this node leaves word in the store; none, where it is empty.
    """
    wrong, doubtful = [], []
    for name, found in versions().items():
        if found != (wanted := probe.versions.get(name, _ABSENT)):
            wrong.append(f"{name} {found} where the driver has {wanted}")
    if probe.store:
        try:
            if (probe.folder / "driver").read_text() != probe.nonce:
                raise FileNotFoundError
            if mark:
                (probe.folder / mark).write_text(probe.nonce)
        except OSError as error:
            reason = error.strerror or "it is another"
            return [*wrong, f"no share in {probe.store} ({reason})"], []
        if _can_lock(Path(probe.store) / "locks" / probe.folder.name):
            doubtful.append("locks do not reach it: run one pipeline at a time on this store")
    for path, size in probe.files:
        try:
            if (found_size := Path(path).stat().st_size) != size:
                wrong.append(f"another {path} ({found_size:,} bytes, not {size:,})")
        except OSError as error:
            wrong.append(f"no {path} ({error.strerror})")
    return wrong, doubtful


def _can_lock(path: Path) -> bool:
    """Whether the driver's lock can be had here: then it holds on one machine only."""
    with contextlib.suppress(OSError), open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def ask_nodes(probe: Probe) -> None:
    """Have every node that can run tasks look for what the probe names.

    Raises:
        UserError: naming each node that is unfit, and why, in one line.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(complaints)
    asked: dict[Any, dict[str, Any]] = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            on_node = task.options(name="probe", scheduling_strategy=there)
            asked[on_node.remote(probe, node["NodeID"])] = node
    unfit: list[str] = []
    deadline = time.monotonic() + _SECONDS
    for reference, node in asked.items():
        address = node["NodeManagerAddress"]
        try:
            wrong, doubtful = ray.get(reference, timeout=max(0, deadline - time.monotonic()))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
            continue  # lost in the meantime, and nothing of ours with it
        except ray.exceptions.GetTimeoutError:
            unfit.append(f"{address} does not answer")
            continue
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"node {address} cannot run this project: {reason}") from None
        if probe.store and not wrong and not (probe.folder / node["NodeID"]).exists():
            wrong.append(f"what it writes into {probe.store} does not come here")
        if wrong:
            unfit.append(f"{address} has {'; '.join(wrong)}")
        for doubt in doubtful:
            print(f"warning: node {address}: {doubt}", flush=True)
    if unfit:
        raise UserError(_mend(probe, unfit))


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as a task: it looks first whether its worker's node is fit."""
    if inspect.isgeneratorfunction(function):

        def stream(*args: Any) -> Iterator[Any]:
            look_here()
            # Not `yield from`: Ray sends into the generator what an inner iterator may not take.
            for value in function(*args):  # noqa: UP028
                yield value

        return stream

    def call(*args: Any) -> Any:
        look_here()
        return function(*args)

    return call


@functools.cache
def look_here() -> None:
    """In a worker: is this node as the job's driver wants it? Looked at once in its life.

    Raises:
        UserError: it is not.
    """
    if told := os.environ.get(VARIABLE):
        probe = decode(told)
        if wrong := complaints(probe)[0]:
            raise UserError(_mend(probe, [f"{socket.gethostname()} has {'; '.join(wrong)}"]))


def encode(probe: Probe) -> str:
    """The probe as the value of an environment variable."""
    return json.dumps(asdict(probe))


def decode(text: str) -> Probe:
    """What `encode` made."""
    values = json.loads(text)
    return Probe(**values | {"files": tuple((path, size) for path, size in values["files"])})


def _mend(probe: Probe, unfit: Sequence[str]) -> str:
    shared = "see that it has the same folders at the same paths, or set data: ship in machine.yaml"
    mends = ["install constraints.txt there", *([shared] if probe.store else [])]
    return f"the cluster's nodes do not fit: {'; '.join(unfit)} ({'; '.join(mends)})"
