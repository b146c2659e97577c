"""Check a run and start its processes.

Everything that can be refused is refused here, in one line and with status 2, because torchrun
turns any status of a worker into 1. Then this process is torchrun.
"""

from __future__ import annotations

from model.size import parameter_count
from pipeline.runtime.errors import UserError
from pipeline.store.store import require_space
from train.checkpoint import directory, init_from
from train.distributed import devices
from train.distributed.devices import device_type, processes_here
from train.distributed.torchrun import run_torchrun
from train.evals import hellaswag
from train.launch.adopt import adopt, adoptable
from train.launch.device_slots import claim_part
from train.run import Run


def launch(other: str | None = None) -> None:
    """Publish the run of `params.yaml` if it is finished, else check its needs and train it.

    Args:
        other: Key, or its first characters, of an unfinished run to adopt (see adopt.py).

    Raises:
        UserError: A parameter, the machine or the data make no run.
        SystemExit: A worker failed.
    """
    run = Run.open()
    if not run.machine.fresh:
        run.check_not_failed()
        if other is None and _publish_finished(run):
            return
    elif other is not None:
        raise UserError("--adopt goes on with a run, GPT2_FRESH=1 forgets it: not both")
    kind = device_type(run.machine.device)
    processes = processes_here(run.machine, kind)
    if kind == "cuda":
        devices.check(run.params.dtype, run.compiles(kind))
    run.split(processes, kind)
    # Weights and two moments of each parameter, in float32, for each checkpoint and the next one.
    size = 12 * parameter_count(run.model.config()) * (run.params.kept() + 1)
    held = sum(path.stat().st_size for path in run.folder.glob("step-*/*"))
    require_space(run.store.root, size - held, "the checkpoints")
    if other is not None:
        print(adopt(run, other), flush=True)
    if run.params.hellaswag:  # fetched before anything is computed; the workers find it there
        hellaswag.read("train.evals.hellaswag", run.params.hellaswag)
    if not directory.steps(run.folder):
        if start := run.params.start():
            init_from.load(start, run.model.config())
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
