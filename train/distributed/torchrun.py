"""A command in several processes: torchrun, inside this process."""

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


def run_torchrun(
    processes: int, restarts: int = 0, *, module: str = "train", arguments: Sequence[str] = ()
) -> None:
    """Runs torchrun in this process, with the workers of one node.

    Args:
        processes: Workers.
        restarts: How often they are started again when one has failed.
        module: What each of them runs, as `python -m` does.
        arguments: Of the module.

    Raises:
        Stopped: A signal came; the workers have saved and left.
        SystemExit: A worker failed, and has said why.
    """
    # torchrun would set it to 1 and say so at length; the workers set their threads themselves.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    handled = (
        signal.SIGINT,
        signal.SIGQUIT,
        *command.stop_signals(),
    )  # and passed on to the workers
    try:
        torchrun.main(
            [
                "--standalone",
                f"--nproc-per-node={processes}",
                f"--max-restarts={restarts}",
                f"--signals-to-handle={','.join(number.name for number in handled)}",
                "-m",
                module,
                *arguments,
            ]
        )
    except SignalException as error:
        raise Stopped(str(error)) from None
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode == command.STOPPED:  # the signal reached the workers alone
            raise Stopped(f"rank {rank}") from None
        if first.exitcode < 0:
            how = (
                f"was killed by {signal.Signals(-first.exitcode).name}; the same command goes on "
                "from the last checkpoint"
            )
        else:
            how = f"ended with status {first.exitcode}, as it says above"
        print(f"error: {error.name}: rank {rank} {how}", file=sys.stderr, flush=True)
        sys.exit(command.FAULT)
