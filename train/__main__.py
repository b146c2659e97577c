"""`torchrun --nproc-per-node=N -m train`, or `python -m train`: one process of a training run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.runtime import command
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from train.distributed.world import World
    from train.run import Run


def main(argv: Sequence[str] = ()) -> None:
    """Join the process group and train the run of `params.yaml`; publish it if it is finished."""
    command.Parser(prog="python -m train", description=main.__doc__).parse_args(argv)
    # torch takes seconds to import, in which this process must notice that its parent has died.
    from train.distributed.compiler import check_compiler
    from train.distributed.devices import check_gpu
    from train.distributed.group import RUN_KEY, under_torchrun
    from train.distributed.rendezvous import process_group
    from train.loop import train
    from train.run import Run

    if not under_torchrun() and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']}, but torchrun did not start this process; run "
            "python -m train.launch or torchrun, or unset it"
        )
    run = Run.open()
    if under_torchrun() and os.environ.get(RUN_KEY, "") not in ("", run.key):
        raise UserError(
            "params.yaml, data/tokens or the code: changed since train.launch has checked this "
            "run; run the same command again"
        )
    if run.params.deterministic:  # NCCL then sums in one order; read when the group is made
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    with process_group(run.machine.device, run.machine.timeout) as world, _lock(run, world):
        _check_same_run(run, world)
        fresh = run.machine.fresh and not world.restarted
        if not world.broadcast(world.first and not fresh and run.publish_finished()):
            compiles = run.compiles(world.device.type)
            if world.device.type == "cuda":
                check_gpu(run.dtype, compiles)
            if compiles:
                check_compiler(world.device.type)
            train(run, world, fresh=fresh)
    if world.first:
        print(run.result(), flush=True)


def _lock(run: Run, world: World) -> contextlib.AbstractContextManager[None]:
    """The run's lock on rank 0, nothing on the others."""
    return run.lock() if world.first else contextlib.nullcontext()


def _check_same_run(run: Run, world: World) -> None:
    """Refuse ranks whose run differs from that of rank 0: nothing later would notice.

    Keys that only observe count as well: ranks that validate at different steps would hang.

    Raises:
        UserError: On the ranks that differ; it names what differs.
        SystemExit: On the others.
    """
    mine = {**run.identity, "micro_batch": run.machine.micro_batch}
    mine["train"] = run.params.model_dump(mode="json")
    first = world.broadcast(mine)
    differs = [name for name, value in mine.items() if first[name] != value]
    if not world.any(bool(differs)):
        return
    if not differs:
        sys.exit(command.USER_ERROR)
    from train.distributed.world import process_name

    raise UserError(
        f"{process_name(world.rank)}: {', '.join(differs)}: not as on rank 0; "
        "give all nodes the same project folder, and the same micro_batch (machine.yaml, "
        "GPT2_MICRO_BATCH)"
    )


if __name__ == "__main__":
    command.run_and_leave(lambda: main(sys.argv[1:]))
