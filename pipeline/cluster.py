"""Ray: a small local cluster, or the one that `RAY_ADDRESS` names, and tasks bounded in flight."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.machine import Machine

# Tasks return small records; Ray's default would reserve a third of the memory.
_OBJECT_STORE_BYTES = 150 * 2**20


@contextlib.contextmanager
def cluster(machine: Machine) -> Iterator[int]:
    """Have Ray up for the length of the block; yield the number of its CPUs.

    Without an address a local Ray is started. Ray itself would join any cluster that happens to run
    on the machine, so the address is always said.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # `uv run` would have Ray rebuild the environment in every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers import this code, from this folder, whatever else is installed.
    path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    import ray  # here, for it takes a second and is not needed where nothing is left to do

    address = machine.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {
        "num_cpus": machine.worker_count,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            ray.init("local", logging_level=logging.ERROR, **local)
        else:
            ray.init(address, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({str(error).splitlines()[0]})"
        ) from None
    # Ray puts its own handler in: a stopped stage would end as a fault, after a stack dump.
    signal.signal(signal.SIGTERM, handler)
    try:
        yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    in_flight: int,
    name: str,
    num_cpus: float = 1,
    tick: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for each task on the cluster, in order, so many at a time.

    A task lost with its worker or node is run again, an `OSError` is tried again; any other error
    is the task's own and is raised here, as itself where it is the user's.

    Args:
        num_cpus: of the cluster's CPUs that a task takes; a part of one where it mostly waits.
        tick: called every second or so while tasks run, to look after their progress.

    Yields:
        The index of a finished task, and what it returned.
    """
    import ray

    # Ray fills a node before it turns to the next, which would not use the others' networks.
    options: dict[str, Any] = {
        "max_retries": 3,
        "retry_exceptions": [OSError],
        "scheduling_strategy": "SPREAD",
    }
    remote: Any = ray.remote(num_cpus=num_cpus, **options)(function).options(name=name)
    queue = iter(enumerate(tasks))
    pending: dict[Any, int] = {}
    try:
        while True:
            while len(pending) < in_flight and (item := next(queue, None)) is not None:
                pending[remote.remote(*item[1])] = item[0]
            if not pending:
                return
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1 if tick else None)
            if tick is not None:
                tick()
            for reference in ready:
                index = pending.pop(reference)
                try:
                    yield index, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
