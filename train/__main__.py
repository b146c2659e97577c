"""`torchrun --nproc-per-node=N -m train`, or `python -m train`: one of the processes that train."""

from __future__ import annotations

import contextlib
import os

from pipeline import stage
from train import gpus
from train.distributed import World, process_group
from train.loop import train
from train.run import Run
from train.trainer import compiles


def main() -> None:
    """Joins the group and trains the run of `params.yaml`; a finished one is only published."""
    run = Run.open()
    if run.params.deterministic:  # NCCL sums in one order; read when the group is made
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    with process_group(run.machine.device, run.machine.timeout) as world, _hold(run, world):
        anew = run.machine.fresh and not _restarted()
        if not world.broadcast(not anew and _publish_finished(run, world)):
            if world.device.type == "cuda":
                gpus.check(run.params.dtype, compiles(run, "cuda"))
            train(run, world, anew=anew)
    if world.first:
        print(run.ending(), flush=True)


def _hold(run: Run, world: World) -> contextlib.AbstractContextManager[None]:
    """The run's lock on rank 0, nothing on the others."""
    return run.lock() if world.first else contextlib.nullcontext()


def _restarted() -> bool:
    """Whether torchrun has started this process after a failure: then nothing is cleared."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _publish_finished(run: Run, world: World) -> bool:
    last = run.finished() if world.first else None
    if last is not None:
        run.publish(last)
    return last is not None


if __name__ == "__main__":
    stage.run(main)
