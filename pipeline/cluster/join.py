"""Start a local Ray, or join a running cluster and check its nodes."""

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster import probe
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store

# Tasks return small records, which bypass the object store; 75 MB is Ray's minimum, a third of the
# memory its default. If /dev/shm is smaller (64 MB in a Docker container), Ray uses /tmp.
_OBJECT_STORE_BYTES = 80 * 2**20
# Ray holds tasks back by its own estimate of the node's memory; here `workers` is the limit.
_MEMORY_BYTES = 2**40
_MAX_TMPDIR_BYTES = 30  # Ray adds a session's name of 50 bytes, and a socket's of 20

_RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run` Ray would rebuild the environment in every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Of tasks cancelled at the end.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
LOCAL_VARIABLES = {
    # False on Linux as well makes Ray listen on the loopback interface only (services.py,
    # get_node_ip_address); it has no other setting for that.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A random token, which only processes of this user can read; Ray reads it once per process.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
"""Of a local Ray, whatever the user has set for a cluster. Ray reads some of them when imported."""
NODE_VARIABLES = {
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
"""Make Ray notice a silent link in seconds, not minutes; nodes need them too
(docs/node-environment.sh)."""


@contextlib.contextmanager
def cluster(machine: Machine, files: Sequence[Path] = (), *, ships: bool = False) -> Iterator[int]:
    """Run the block with Ray initialised; yield the number of CPUs.

    Without an address, start a local Ray. Ray itself would join any cluster that runs on the
    machine, so it is always given an address. If nothing is shared (`data: ship`), a stage whose
    tasks open files uses a local Ray, next to its files.

    Args:
        files: Files that the tasks read, at the same paths on all nodes.
        ships: Whether tasks open no files but are sent what they need.

    Raises:
        UserError: No cluster answers, or its nodes differ from this machine.
        StageFailed: The local Ray did not start.
    """
    address = machine.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if machine.data == "ship" and not ships:
        address = "local"
    variables = _RAY_VARIABLES if address == "local" else _RAY_VARIABLES | NODE_VARIABLES
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    if address == "local":
        os.environ.update(LOCAL_VARIABLES)
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address == "local":
            _start(machine)
        else:
            store = Store.open(machine) if machine.data == "shared" else None
            node_probe = stack.enter_context(probe.open_probe(store, files))
            _join(address, node_probe)
        import ray

        # Ray installs its own handler, which would end a stopped stage as a fault, with a dump.
        signal.signal(signal.SIGTERM, handler)
        try:
            if address != "local":
                probe.check_nodes(node_probe)
            yield max(1, int(ray.cluster_resources().get("CPU", 0)))
        finally:
            ray.shutdown()


def _start(machine: Machine) -> None:
    """Start a local Ray; raise `StageFailed` if it does not start."""
    # Workers must import the code of this folder, even if another copy is installed.
    path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    _use_short_tmpdir()
    import ray  # takes a second, so only if there is work

    try:
        ray.init(
            "local",
            num_cpus=machine.worker_count,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _memory=_MEMORY_BYTES,
            logging_level=logging.ERROR,
        )
        host = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(host).is_loopback:
            raise RuntimeError(f"it would listen at {host}, for the network")
    except Exception as error:  # Ray has no exception class for this
        reason = " ".join(str(error).split())
        slow = " (Ray gives up after 30 s: is the machine overloaded?)" * ("timed out" in reason)
        raise StageFailed(
            f"Ray did not start on this machine: {reason[:200]}{slow}; finished work is kept, run "
            "the same command again to resume"
        ) from error


def _use_short_tmpdir() -> None:
    """Keep a local Ray out of a TMPDIR that it cannot use: the path of a socket has 107 bytes."""
    folder = os.environ.get("TMPDIR", "/tmp")
    if len(os.fsencode(folder)) > _MAX_TMPDIR_BYTES or not os.access(folder, os.W_OK | os.X_OK):
        os.environ.setdefault("RAY_TMPDIR", "/tmp")


def _join(address: str, node_probe: probe.Probe) -> None:
    """Join a running cluster and send it the code of the package `pipeline`.

    Only the package is sent, not the project's folder with data, store and history.

    Raises:
        UserError: The cluster does not answer, or refuses this driver.
    """
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"ray_address: {address}: Ray Client is not supported; run the stage on a node of the "
            "cluster with ray_address: HOST:6379, or submit it with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if port.isdigit():  # Ray would retry for 30 s, then report a crash
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"ray_address: no Ray cluster answers at {address} ({error}); start one there, or "
                "correct the address in machine.yaml or RAY_ADDRESS"
            ) from None
    environment: dict[str, Any] = {
        "py_modules": [str(probe.PACKAGE)],
        "excludes": ["__pycache__"],
        "env_vars": {probe.VARIABLE: probe.encode(node_probe)},
    }
    try:
        ray.init(address, logging_level=logging.ERROR, runtime_env=environment)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"ray_address: cannot join the Ray cluster at {address} ({reason[:300]}); check that "
            "it runs, that this machine is one of its nodes, and that RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN_PATH are set as on the others"
        ) from None
