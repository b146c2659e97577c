"""`torchrun --nproc-per-node=N -m train`, or `python -m train`: one of the processes that train."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from train.distributed import devices
from train.distributed.rendezvous import process_group
from train.distributed.world import World
from train.loop import train
from train.run import Run


def main() -> None:
    """Joins the group and trains the run of `params.yaml`; a finished one is only published."""
    run = Run.open()
    if run.params.deterministic:  # NCCL sums in one order; read when the group is made
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    with process_group(run.machine.device, run.machine.timeout) as world, _hold(run, world):
        _check_same(run, world)
        anew = run.machine.fresh and not world.restarted
        if not world.broadcast(not anew and _publish_finished(run, world)):
            if world.device.type == "cuda":
                devices.check(run.params.dtype, run.compiles("cuda"))
            train(run, world, anew=anew)
    if world.first:
        print(run.ending(), flush=True)


def _hold(run: Run, world: World) -> contextlib.AbstractContextManager[None]:
    """The run's lock on rank 0, nothing on the others."""
    return run.lock() if world.first else contextlib.nullcontext()


def _check_same(run: Run, world: World) -> None:
    """Refuses ranks that would train something else than rank 0: nothing later would notice.

    Raises:
        UserError: On the ranks that differ; names in what.
        SystemExit: On the others.
    """
    mine = {**run.identity, "micro_batch": run.machine.micro_batch}
    first = world.broadcast(mine)
    differs = [name for name, value in mine.items() if first[name] != value]
    if not world.any(bool(differs)):
        return
    if not differs:
        sys.exit(command.USER_ERROR)
    raise UserError(
        f"rank {world.rank} on {socket.gethostname()}: {', '.join(differs)}: not as on rank 0; "
        "give all nodes the same project folder, and the same micro_batch (machine.yaml, "
        "GPT2_MICRO_BATCH)"
    )


def _publish_finished(run: Run, world: World) -> bool:
    last = run.finished() if world.first else None
    if last is not None:
        run.publish(last)
    return last is not None


if __name__ == "__main__":
    command.run(main)
