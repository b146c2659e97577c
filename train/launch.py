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
from train import checkpoint, gpus, hellaswag
from train.adopt import adopt, adoptable
from train.claim import claim_part
from train.distributed import device_type, processes_here
from train.run import Run
from train.torchrun import run_torchrun
from train.trainer import compiles, plan_split


def main(argv: Sequence[str] = ()) -> None:
    """Publishes the run if it is finished, else checks all that it needs and runs torchrun."""
    parser = argparse.ArgumentParser(prog="python -m train.launch", description=main.__doc__)
    parser.add_argument(
        "--adopt",
        metavar="RUN",
        help="go on from an unfinished run (its key, or how that begins) whose code was another",
    )
    args = parser.parse_args(argv)
    run = Run.open()
    if not run.machine.fresh:
        run.check_not_failed()
        if args.adopt is None and _publish_finished(run):
            return
    elif args.adopt is not None:
        raise UserError("--adopt goes on with a run, GPT2_FRESH=1 forgets it: not both")
    kind = device_type(run.machine.device)
    processes = processes_here(run.machine, kind)
    if kind == "cuda":
        gpus.check(run.params.dtype, compiles(run, kind))
    plan_split(run, processes, kind)
    # Weights and two moments of each parameter, in float32, for each checkpoint and the next one.
    size = 12 * parameter_count(run.model.config()) * (run.params.kept() + 1)
    held = sum(path.stat().st_size for path in run.folder.glob("step-*/*"))
    require_space(run.store.root, size - held, "the checkpoints")
    if args.adopt is not None:
        print(adopt(run, args.adopt), flush=True)
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


def _publish_finished(run: Run) -> bool:
    """Publishes a finished run, on whatever machine; False for any other run."""
    with run.lock():
        last = run.finished()
        if last is None:
            return False
        run.publish(last)
    print("this run is finished already; " + run.ending(), flush=True)
    return True


if __name__ == "__main__":
    stage.run(lambda: main(sys.argv[1:]))
