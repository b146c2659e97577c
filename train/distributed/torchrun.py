"""Run a command in several processes of this node: torchrun's agent, inside this process.

`torchrun --standalone` would listen on all interfaces, and unpickle what it finds in its store. The
agent here meets nobody else: it serves a store on the loopback interface to its own workers.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline.runtime import command
from pipeline.runtime.errors import Stopped
from pipeline.runtime.machine import usable_cores
from train.distributed.group import LOOPBACK, RUN_KEY, loopback_store
from train.distributed.world import HOW_TO_RESUME

_BACKEND = "loopback"


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single node, whose store listens on the loopback interface."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store = loopback_store(timedelta(minutes=1))

    @property
    def use_agent_store(self) -> bool:
        """Let the workers meet in this store, too."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, for the first start or a restart."""
        at = RendezvousStoreInfo(LOOPBACK, self._store.port)
        return RendezvousInfo(self._store, 0, 1, at)

    def get_backend(self) -> str:
        """Name this backend."""
        return _BACKEND

    def get_run_id(self) -> str:
        """Return the workers' TORCHELASTIC_RUN_ID."""
        return self._run_id

    def num_nodes_waiting(self) -> int:
        """No node joins later."""
        return 0

    def is_closed(self) -> bool:
        """It is open as long as this process."""
        return False

    def set_closed(self) -> None:
        """There is nothing to close."""

    def shutdown(self) -> bool:
        """There is nothing to close."""
        return True


def run_torchrun(
    processes: int,
    restarts: int = 0,
    run_key: str = "",
    *,
    module: str = "train",
    arguments: Sequence[str] = (),
) -> None:
    """Run torchrun's agent in this process, with the workers of one node.

    Args:
        restarts: How often to restart all workers after one has failed.
        run_key: Key of the run that the workers must find in their files; empty: any.
        module: Module that each worker runs, as `python -m` does.

    Raises:
        Stopped: A signal came; the workers have saved and exited.
        SystemExit: A worker failed and has reported its error.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    os.environ[command.PARENT] = str(os.getpid())
    os.environ[RUN_KEY] = run_key
    rendezvous_handler_registry.register(_BACKEND, LoopbackRendezvous)
    forwarded = (signal.SIGINT, signal.SIGQUIT, *command.stop_signals())
    with tempfile.TemporaryDirectory(prefix="torchelastic_") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="train.launch",
            rdzv_backend=_BACKEND,
            max_restarts=restarts,
            signals_to_handle=",".join(number.name for number in forwarded),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
        except SignalException as error:
            raise Stopped(str(error)) from None
        except ChildFailedError as error:
            _report(error)


def _report(error: ChildFailedError) -> None:
    """Say how the first worker failed, and exit."""
    rank, first = error.get_first_failure()
    if first.exitcode == command.STOPPED:  # the signal reached only the workers
        raise Stopped(f"rank {rank}") from None
    if first.exitcode < 0:
        how = f"was killed by {signal.Signals(-first.exitcode).name}; {HOW_TO_RESUME}"
    else:
        how = f"exited with status {first.exitcode}; its error is printed above"
    print(f"error: {error.name}: rank {rank} {how}", file=sys.stderr, flush=True)
    sys.exit(command.FAULT)
