"""Run a segment again, as the run itself did: same parameters, split, data and number of processes.

    begin's checkpoint ──► a store of its own ──► Trainer.restore, steps, validations ──► end

A segment in which the conditions change (another number of processes, say) is run in parts, each of
which starts from the checkpoint that the part before wrote. `python -m train.audit.replay JOB` is
one process of a part.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import TokenStream
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from train.checkpoint import directory
from train.data.loader import Batches
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.distributed.torchrun import run_torchrun
from train.distributed.world import World
from train.invariant import InvariantTrainer
from train.monitor.history import SOURCE_LOSS
from train.params import ModelParams, TrainParams
from train.run import TOKENS, Run
from train.trainer import Trainer
from train.validation import source_parts

RESULT = "replayed.json"
FIXED = ("micro_batch", "loss_chunk", "compile", "overlap", "attention")
LOGGED_STEP = ("tokens", "lr", "train/loss", "grad_norm")  # of a replayed step, in its order


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part of a segment to run again.

    Attributes:
        conditions: Of the chain.
        validations: (step, `val_tokens`) of the validations to repeat, in order.
        work_dir: Store in which the part finds its beginning and leaves its end.
    """

    first: int
    stop: int
    conditions: dict[str, Any]
    validations: Sequence[tuple[int, int]]
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
        # A run that stops at a non-finite step has none in its log; skipping changes no other.
        observing = {"val_tokens": 1, "non_finite": "skip"}
        run = Run(
            model=ModelParams.model_validate(identity["model"]),
            params=TrainParams.model_validate({**identity["train"], **observing}),
            machine=machine,
            train_data=TokenStream(TOKENS, "train"),
            val_data=TokenStream(TOKENS, "val"),
            code_key=identity["code_key"],
        )
        vars(run)["identity"] = identity  # not computed again: that would read `train.init`
        return run


@dataclass(frozen=True)
class Replayed:
    """What a part has computed.

    Attributes:
        steps: Step -> the numbers of `LOGGED_STEP`; None: non-finite.
        validations: (step, `val_tokens`) -> losses by their name in the log; None: non-finite.
        samples: Seen after the last step.
        files: Hashes of weights and optimizer state after the last step.
    """

    steps: dict[int, list[float | None]]
    validations: dict[tuple[int, int], dict[str, float | None]]
    samples: int
    files: dict[str, str]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Replayed:
        """Read what `steps_again` returned."""
        return cls(
            {step: row for step, *row in found["steps"]},
            {(step, n): losses for step, n, losses in found["validations"]},
            found["samples"],
            found["files"],
        )


def prepare(job: Job, begin: Path | None, files: Mapping[str, str]) -> Path:
    """Copy the checkpoint that a part begins with into its store; return the run's folder there.

    Only weights and optimizer state are copied, and compared with ``files``, their hashes in the
    chain. `state.json` is written again: no link has all that the run's says.

    Raises:
        OSError: A file is not a regular one.
        BrokenCheckpoint: It has another content.
    """
    run = job.run()
    if begin is None:
        return run.folder
    folder = run.folder / directory.folder_name(job.first)
    folder.mkdir(parents=True)
    for name in (directory.MODEL, directory.OPTIMIZER):
        if (begin / name).is_symlink():
            raise OSError(errno.EINVAL, "not a regular file", str(begin / name))
        atomic.check_regular(begin / name)
        shutil.copyfile(begin / name, folder / name)
        if atomic.sha256_file(folder / name) != files[name]:
            raise directory.BrokenCheckpoint(f"{begin / name}: does not match its link")
    state = {
        "schema_version": directory.SCHEMA_VERSION,
        "step": job.first,
        "samples": run.samples(job.first),
        "dataset_key": run.dataset_key,
        "train": run.params.model_dump(mode="json"),
        "arithmetic": job.conditions["arithmetic"],
        "sha256": dict(files),
    }
    atomic.write_json(folder / directory.STATE, atomic.sealed(state))
    return run.folder


def replay(job: Job, processes: int) -> Replayed:
    """Run a part in processes of their own, or in this one if it is one.

    Raises:
        SystemExit: A process failed, and has reported its error.
    """
    path = Path(job.work_dir) / "job.json"
    atomic.write_json(path, asdict(job))
    if processes == 1:
        main([str(path)])
    else:
        run_torchrun(processes, module="train.audit.replay", arguments=[str(path)])
    return Replayed.of(json.loads((Path(job.work_dir) / RESULT).read_text()))


def main(argv: Sequence[str]) -> None:
    """Run one process of a part."""
    job = Job(**json.loads(Path(argv[0]).read_text()))
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
    steps: list[list[float | None]] = []
    validations: list[tuple[int, int, dict[str, float | None]]] = []
    with trainer.writer, batches, Interrupt(world) as interrupt:
        for step in range(job.first, job.stop):
            rate, numbers = trainer.step(step, batches, interrupt)
            row = [run.tokens(step + 1), rate, *numbers.tolist()]
            steps.append([step + 1, *map(_finite, row)])
            for n in [n for at, n in job.validations if at == step + 1]:
                texts = {"val/loss": (run.val_data, n)}
                for name, part in source_parts(run.val_data, n).items():
                    texts[f"{SOURCE_LOSS}{name}"] = part
                losses = {k: _finite(trainer.loss_on(*v, interrupt)) for k, v in texts.items()}
                validations.append((step + 1, n, losses))
        trainer.save(job.stop)
    if not world.first:
        return {}
    saved = run.folder / directory.folder_name(job.stop)
    files = directory.read_state(saved)["sha256"]
    return {
        "steps": steps,
        "validations": validations,
        "samples": run.samples(job.stop),
        "files": files,
    }


def _finite(number: float) -> float | None:
    """The number for JSON, which has none that is not finite."""
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    command.run_and_leave(lambda: main(sys.argv[1:]))
