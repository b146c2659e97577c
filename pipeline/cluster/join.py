"""Ray: a small local cluster, or the one that is named, found fit before any work."""

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster import probe
from pipeline.cluster.tasks import run_tasks
from pipeline.runtime.errors import StageFailed, UserError
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store

__all__ = ["cluster", "run_tasks"]

# Tasks return small records, which go through no object store; Ray takes no smaller one than 75 MB.
# Ray's default would be a third of the memory. Where /dev/shm is smaller (64 MB in a container as
# Docker starts it), Ray puts the store into its own folder in /tmp.
_OBJECT_STORE_BYTES = 80 * 2**20
# Ray's own count of a node's memory, which it holds tasks back by. What runs on this machine at
# once is said by `workers`.
_MEMORY_BYTES = 2**40

_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # `uv run` would have Ray rebuild the environment in every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Of tasks that were given up, at the end.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
# By default it takes minutes until a link that went silent is noticed. The nodes need them as well
# (docs/node-environment.sh).
NODE_VARIABLES = {
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


@contextlib.contextmanager
def cluster(machine: Machine, files: Sequence[Path] = (), *, ships: bool = False) -> Iterator[int]:
    """Have Ray up for the length of the block; yield the number of its CPUs.

    Without an address a local Ray is started. Ray itself would join any cluster that happens to run
    on the machine, so the address is always said. Where nothing is shared (`data: ship`) a stage
    whose tasks open files runs on a local Ray, beside its files.

    Args:
        files: that the tasks read where they run.
        ships: whether the tasks open no file, but are sent what they need.

    Raises:
        UserError: no cluster answers, or its nodes are unfit for the work.
    """
    address = machine.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if machine.data == "ship" and not ships:
        address = "local"
    _set_defaults(_ALWAYS if address == "local" else _ALWAYS | NODE_VARIABLES)
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address == "local":
            _start(machine)
        else:
            store = Store.open(machine) if machine.data == "shared" else None
            asked = stack.enter_context(probe.probing(store, files))
            _join(address, asked)
        import ray

        # Ray puts its own handler in: a stopped stage would end as a fault, after a stack dump.
        signal.signal(signal.SIGTERM, handler)
        try:
            if address != "local":
                probe.ask_nodes(asked)
            yield max(1, int(ray.cluster_resources().get("CPU", 0)))
        finally:
            ray.shutdown()


def _set_defaults(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _start(machine: Machine) -> None:
    """Start a local Ray.

    Raises:
        StageFailed: It did not come up.
    """
    # Workers import this code, from this folder, whatever else is installed.
    path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    import ray  # here, for it takes a second and is not needed where nothing is left to do

    try:
        ray.init(
            "local",
            num_cpus=machine.worker_count,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _memory=_MEMORY_BYTES,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray has no class of its own for it
        reason = " ".join(str(error).split())
        slow = (
            "; is the machine overloaded? Ray gives up after 30 s" if "timed out" in reason else ""
        )
        raise StageFailed(
            f"Ray did not start on this machine ({reason[:200]}){slow}; what is finished is kept, "
            "and the same command goes on from here"
        ) from error


def _join(address: str, asked: probe.Probe) -> None:
    """Join a running cluster; this code goes with the job.

    The package alone is sent, and not the folder, in which data, store and history lie: the nodes
    need nothing of the project but what `pip` installs.
    """
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"ray_address: {address} is Ray Client's; start the stage on a node of the cluster "
            "(its head, say) with ray_address: HOST:6379, or send it there by `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if port.isdigit():  # Ray would try for half a minute, and speak of crashes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"ray_address: no Ray cluster answers at {address} ({error}); start it, or correct "
                "the address in machine.yaml or RAY_ADDRESS"
            ) from None
    environment: dict[str, Any] = {
        "py_modules": [str(Path(__file__).parents[1])],
        "excludes": ["__pycache__"],
        "env_vars": {probe.VARIABLE: probe.encode(asked)},
    }
    try:
        ray.init(address, logging_level=logging.ERROR, runtime_env=environment)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"ray_address: cannot join the Ray cluster at {address} ({reason[:300]}); is it up, is "
            "this machine a node of it, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH set as there?"
        ) from None
