"""`python -m train.launch`: the training stage as DVC runs it.

Everything that can be refused is refused here, in one line and with status 2, for torchrun turns
any status of a worker into 1. Then this process becomes torchrun.
"""

from __future__ import annotations

import os
import sys

from pipeline import stage
from pipeline.errors import UserError
from train.distributed import cores, default_processes, device_type
from train.run import Run
from train.trainer import plan_split


def main() -> None:
    """Checks the run, publishes it if it is finished, else becomes torchrun."""
    run = Run.open()
    kind = device_type(run.machine.device)
    processes = run.machine.processes or default_processes(kind)
    if kind == "cuda" and processes > default_processes(kind):
        raise UserError(
            f"processes (machine.yaml, GPT2_PROCESSES): {processes}, but there are "
            f"{default_processes(kind)} GPUs; use as many, or device: cpu"
        )
    plan_split(run, processes, kind)
    if not run.machine.fresh:
        run.check_not_failed()
        with run.lock():
            last = run.finished()
            if last is not None:
                run.publish(last)
        if last is not None:
            print("this run is finished already; " + run.ending(), flush=True)
            return
    become_torchrun(processes)


def become_torchrun(processes: int) -> None:
    """Replaces this process by torchrun, with the workers of one node; does not return."""
    # torchrun would set it to 1 and say so at length; the workers set their threads themselves.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    os.execvp(
        sys.executable,
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "train",
        ],
    )


if __name__ == "__main__":
    stage.run(main)
