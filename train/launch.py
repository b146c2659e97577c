"""`python -m train.launch [--adopt RUN]`: the training stage as DVC runs it.

Everything that can be refused is refused here, in one line and with status 2, for torchrun turns
any status of a worker into 1. Then this process is torchrun.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from model.size import parameter_count
from pipeline import stage
from pipeline.errors import UserError
from pipeline.store import require_space
from train import checkpoint, hellaswag
from train.adopt import adopt, adoptable
from train.claim import claim_part
from train.distributed import default_processes, device_type
from train.run import Run
from train.torchrun import run_torchrun
from train.trainer import plan_split


def main(argv: Sequence[str] = ()) -> None:
    """Checks the run, publishes it if it is finished, else runs torchrun."""
    parser = argparse.ArgumentParser(prog="python -m train.launch", description=main.__doc__)
    parser.add_argument(
        "--adopt",
        metavar="RUN",
        help="go on from an unfinished run (its key, or how that begins) whose code was another",
    )
    args = parser.parse_args(argv)
    run = Run.open()
    kind = device_type(run.machine.device)
    processes = run.machine.processes or default_processes(kind, run.machine.cores)
    if kind == "cuda" and processes > default_processes(kind):
        raise UserError(
            f"processes (machine.yaml, GPT2_PROCESSES): {processes}, but there are "
            f"{default_processes(kind)} GPUs; use as many, or device: cpu"
        )
    plan_split(run, processes, kind)
    # Weights and two moments of each parameter, in float32, for each checkpoint and the next one.
    size = 12 * parameter_count(run.model.config()) * (run.params.kept() + 1)
    require_space(run.store.root, size, "the checkpoints")
    if args.adopt is not None:
        if run.machine.fresh:
            raise UserError("--adopt goes on with a run, GPT2_FRESH=1 forgets it: not both")
        print(adopt(run, args.adopt), flush=True)
    if not run.machine.fresh:
        run.check_not_failed()
        with run.lock():
            last = run.finished()
            if last is not None:
                run.publish(last)
        if last is not None:
            print("this run is finished already; " + run.ending(), flush=True)
            return
    if run.params.hellaswag:  # fetched before anything is computed; the workers find it there
        hellaswag.read("train.hellaswag", run.params.hellaswag)
    if not checkpoint.steps(run.folder):
        if start := run.params.start():
            start.load(run.model.config())
        for key, step in adoptable(run):
            print(
                f"note: run {key[:12]}, stopped at step {step}, differs from this one in code "
                f"alone; python -m train.launch --adopt {key[:12]} goes on with it",
                flush=True,
            )
    with claim_part(run.machine, kind, processes):
        run_torchrun(processes, run.machine.restarts)


if __name__ == "__main__":
    stage.run(lambda: main(sys.argv[1:]))
