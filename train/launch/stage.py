"""Check a run, then start its processes.

Everything that can be refused is refused here, in one line and with status 2, because torchrun
turns any status of a worker into 1. Then this process becomes torchrun's agent.
"""

from __future__ import annotations

from model.size import parameter_count
from pipeline.runtime.errors import UserError
from pipeline.store.store import require_space
from train.checkpoint import directory, init_from
from train.distributed.compiler import check_compiler
from train.distributed.devices import check_gpu, device_type, processes_here
from train.distributed.group import under_torchrun
from train.distributed.torchrun import run_torchrun
from train.evals import hellaswag
from train.launch.adopt import adopt, adoptable
from train.launch.device_slots import claim_devices
from train.monitor.loggers import check_installed
from train.run import Run


def launch(adopted: str | None = None, *, retry: bool = False) -> None:
    """Publish the run of `params.yaml` if it is finished; else check it and train it.

    Args:
        adopted: Key, or its first characters, of an unfinished run of other code to resume from.
        retry: Whether to repeat steps that failed, from the last checkpoint.

    Raises:
        UserError: A parameter, the machine or the data makes the run impossible.
        SystemExit: A worker failed.
    """
    if under_torchrun():
        raise UserError(
            "TORCHELASTIC_RUN_ID: set, but train.launch starts its own processes; run `torchrun -m "
            "train`, or unset it if a shell has left it"
        )
    run = Run.open()
    if run.machine.fresh and (adopted is not None or retry):
        flag = "--retry" if retry else "--adopt"
        raise UserError(f"{flag}: resumes from a run, which GPT2_FRESH=1 would delete; use one")
    if not run.machine.fresh:
        if retry:
            run.forget_failure()
        run.check_not_failed()
        if adopted is None and _publish_finished(run):
            print("this run is already finished; " + run.result(), flush=True)
            return
    device = device_type(run.machine.device)
    processes = processes_here(run.machine, device)
    if device == "cuda":
        check_gpu(run.dtype, run.compiles(device))
    if run.compiles(device):
        check_compiler(device)
    run.split(processes, device)
    check_installed(run.machine.loggers)
    # Weights and two moments per parameter, in float32, of the kept checkpoints and the next one.
    size = 12 * parameter_count(run.model.config()) * (run.params.kept() + 1)
    held = sum(path.stat().st_size for path in run.folder.glob("step-*/*"))
    require_space(run.store.root, size - held, "the checkpoints")
    if adopted is not None:
        print(adopt(run, adopted), flush=True)
    if run.params.hellaswag:  # downloaded before anything is computed; the workers find the file
        hellaswag.read("train.hellaswag", run.params.hellaswag)
    if not directory.checkpoints(run.folder):
        if start := run.params.start():
            init_from.load(start, run.model.config())
        for key, step in adoptable(run):
            print(
                f"note: run {key[:12]}, stopped at step {step}, differs only in its code; "
                f"python -m train.launch --adopt {key[:12]} resumes from it",
                flush=True,
            )
    with claim_devices(run.machine, device, processes):
        run_torchrun(processes, run.machine.restarts, run.key)


def _publish_finished(run: Run) -> bool:
    with run.lock():
        return run.publish_finished()
