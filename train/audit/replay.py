"""Run a segment again, as the run itself did: same parameters, split, data and number of processes.

    begin's checkpoint ──► a store of its own ──► Trainer.restore, steps, validations ──► end

A segment in which the conditions change (another number of processes, say) is run in parts, each of
which starts from the checkpoint that the part before wrote. `python -m train.audit.replay JOB` is
one process of a part.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import TokenStream
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from train.checkpoint import directory
from train.checkpoint.directory import Keep
from train.data.loader import Batches
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.distributed.torchrun import run_torchrun
from train.distributed.world import World
from train.invariant import InvariantTrainer
from train.optim.param_groups import flat_state
from train.params import ModelParams, TrainParams
from train.run import TOKENS, Run
from train.trainer import Trainer

RESULT = "replayed.json"
FIXED = ("micro_batch", "loss_chunk", "compile", "overlap", "attention")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part of a segment to run again.

    Attributes:
        conditions: Of the chain.
        observed: Values of the keys of `train` that only observe.
        validations: Step -> `val_tokens` of the validations to repeat.
        work_dir: Store in which the part finds its beginning and leaves its end.
    """

    first: int
    stop: int
    conditions: dict[str, Any]
    observed: dict[str, Any]
    validations: dict[int, int]
    work_dir: str

    def run(self) -> Run:
        """The run, in the store of the job."""
        identity, arithmetic = self.conditions["identity"], self.conditions["arithmetic"]
        settings = {name: arithmetic.get(name) for name in FIXED}
        settings["overlap"] = bool(settings["overlap"])
        if settings["attention"] == "flex":  # chosen because the model is compiled
            settings["attention"] = None
        if identity["train"].get("invariant"):
            settings["loss_chunk"] = None
        machine = Machine(
            **settings,
            device=arithmetic["device"],
            work_dir=Path(self.work_dir),
            loggers=[],
            other_rounding=True,  # conditions are compared by the audit
        )
        run = Run(
            model=ModelParams.model_validate(identity["model"]),
            params=TrainParams.model_validate({**self.observed, **identity["train"]}),
            machine=machine,
            train_data=TokenStream(TOKENS, "train"),
            val_data=TokenStream(TOKENS, "val"),
            code_key=identity["code_key"],
        )
        vars(run)["identity"] = identity  # not computed again: `train.init` may be elsewhere now
        return run


def prepare(job: Job, begin: Path | None) -> Path:
    """Copy the checkpoint that a part begins with into its store; return the run's folder there."""
    folder = job.run().folder
    if begin is not None:
        shutil.copytree(begin, folder / directory.folder_name(job.first))
    return folder


def replay(job: Job, processes: int) -> dict[str, Any]:
    """Run a part in processes of their own, or in this one if it is one.

    Returns:
        "steps": step -> learning rate, loss, norm; "validations": step -> loss; "files": hashes.

    Raises:
        SystemExit: A process failed, and has reported its error.
    """
    path = Path(job.work_dir) / "job.json"
    atomic.write_json(path, asdict(job))
    if processes == 1:
        main([str(path)])
    else:
        run_torchrun(processes, module="train.audit.replay", arguments=[str(path)])
    found: dict[str, Any] = json.loads((Path(job.work_dir) / RESULT).read_text())
    return found


def main(argv: Sequence[str]) -> None:
    """Run one process of a part."""
    values = json.loads(Path(argv[0]).read_text())
    values["validations"] = {int(step): n for step, n in values["validations"].items()}
    job = Job(**values)
    with process_group(job.conditions["arithmetic"]["device"]) as world:
        threads = job.conditions["arithmetic"]["threads"]
        if world.device.type == "cpu":
            torch.set_num_threads(threads)
        result = steps_again(job, world)
        if world.first:
            atomic.write_json(Path(job.work_dir) / RESULT, result)


def steps_again(job: Job, world: World) -> dict[str, Any]:
    """Run the steps of a part and save what they end with; see `replay`."""
    run = job.run()
    trainer = (InvariantTrainer if run.params.invariant else Trainer)(run, world)
    if (done := trainer.restore()) != job.first:
        raise RuntimeError(f"begins after step {done}, not {job.first}")
    trainer.warm_up()
    batches = Batches(
        run.train_data,
        run.order,
        trainer.split,
        rank=world.rank,
        spans=run.batches.spans(job.first, job.stop),
        device=world.device,
    )
    steps, validations = {}, {}
    with batches, Interrupt(world) as interrupt:
        for step in range(job.first, job.stop):
            rate, numbers = trainer.step(step, batches, interrupt)
            steps[step + 1] = [rate, *numbers.tolist()]
            if n := job.validations.get(step + 1):
                trainer.params = run.params.model_copy(update={"val_tokens": n})
                validations[step + 1] = trainer.validate(interrupt)
    if not world.first:
        return {}
    state = trainer.state(job.stop)
    del state["chain"]  # of the run, not of this part
    saved = directory.save(
        run.folder,
        model={name: tensor.cpu() for name, tensor in trainer.gpt.state_dict().items()},
        optimizer={
            name: tensor.cpu()
            for name, tensor in flat_state(trainer.optimizer, trainer.named).items()
        },
        state=state,
        keep=Keep(last=2),
    )
    files = directory.read_state(saved)["sha256"]
    return {"steps": steps, "validations": validations, "files": files}


if __name__ == "__main__":
    command.run_and_leave(lambda: main(sys.argv[1:]))
