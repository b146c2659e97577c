"""Run a command in several processes: torchrun, inside this process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pipeline.runtime import command
from pipeline.runtime.errors import Stopped
from pipeline.runtime.machine import usable_cores
from train.distributed.world import HOW_TO_RESUME


def run_torchrun(
    processes: int, restarts: int = 0, *, module: str = "train", arguments: Sequence[str] = ()
) -> None:
    """Run torchrun in this process, with the workers of one node.

    Args:
        restarts: How often to restart all workers after one has failed.
        module: Module that each worker runs, as `python -m` does.

    Raises:
        Stopped: A signal came; the workers have saved and exited.
        SystemExit: A worker failed and has reported its error.
    """
    # torchrun would set it to 1 and print a long notice; the workers set their threads themselves.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    forwarded = (signal.SIGINT, signal.SIGQUIT, *command.stop_signals())
    try:
        torchrun.main(
            [
                "--standalone",
                f"--nproc-per-node={processes}",
                f"--max-restarts={restarts}",
                f"--signals-to-handle={','.join(number.name for number in forwarded)}",
                "-m",
                module,
                *arguments,
            ]
        )
    except SignalException as error:
        raise Stopped(str(error)) from None
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode == command.STOPPED:  # the signal reached only the workers
            raise Stopped(f"rank {rank}") from None
        if first.exitcode < 0:
            how = f"was killed by {signal.Signals(-first.exitcode).name}; {HOW_TO_RESUME}"
        else:
            how = f"exited with status {first.exitcode}; its error is printed above"
        print(f"error: {error.name}: rank {rank} {how}", file=sys.stderr, flush=True)
        sys.exit(command.FAULT)
