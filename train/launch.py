"""`python -m train.launch`: the training stage as DVC runs it.

Everything that can be refused is refused here, in one line and with status 2, for torchrun turns
any status of a worker into 1. Then this process is torchrun.
"""

from __future__ import annotations

import os
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from model.size import parameter_count
from pipeline import stage
from pipeline.errors import Stopped, UserError
from pipeline.machine import usable_cores
from pipeline.store import require_space
from train.distributed import default_processes, device_type
from train.run import Run
from train.trainer import plan_split


def main() -> None:
    """Checks the run, publishes it if it is finished, else runs torchrun."""
    run = Run.open()
    kind = device_type(run.machine.device)
    processes = run.machine.processes or default_processes(kind)
    if kind == "cuda" and processes > default_processes(kind):
        raise UserError(
            f"processes (machine.yaml, GPT2_PROCESSES): {processes}, but there are "
            f"{default_processes(kind)} GPUs; use as many, or device: cpu"
        )
    plan_split(run, processes, kind)
    # Weights and two moments of each parameter, in float32, for each checkpoint and the next one.
    size = 12 * parameter_count(run.model.config()) * (run.params.keep_checkpoints + 1)
    require_space(run.store.root, size, "the checkpoints")
    if not run.machine.fresh:
        run.check_not_failed()
        with run.lock():
            last = run.finished()
            if last is not None:
                run.publish(last)
        if last is not None:
            print("this run is finished already; " + run.ending(), flush=True)
            return
    run_torchrun(processes)


def run_torchrun(processes: int) -> None:
    """Runs torchrun in this process, with the workers of one node.

    Raises:
        Stopped: A signal came; the workers have saved and left.
        SystemExit: A worker failed, and has said why.
    """
    # torchrun would set it to 1 and say so at length; the workers set their threads themselves.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={processes}", "-m", "train"])
    except SignalException as error:
        raise Stopped(str(error)) from None
    except ChildFailedError as error:
        print(f"error: {error.name}: a training process failed", file=sys.stderr, flush=True)
        sys.exit(stage.FAULT)


if __name__ == "__main__":
    stage.run(main)
