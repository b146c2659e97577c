"""The training loop, from the newest checkpoint to the published model."""

from __future__ import annotations

import sys

from model.size import flops_per_token
from pipeline.runtime import command
from pipeline.runtime.errors import Stopped
from train.checkpoint import directory
from train.data.loader import Batches
from train.distributed.interrupt import Interrupt, Interrupted
from train.distributed.world import World
from train.evals import hellaswag
from train.monitor.health import Health, NonFinite
from train.monitor.meter import Meter
from train.run import Run
from train.run_summary import banner, start_record, summary
from train.trainer import Trainer


def train(run: Run, world: World, *, anew: bool = False) -> None:
    """Trains a run to its end, from its newest checkpoint on, and publishes it.

    Args:
        run: What is trained.
        world: By whom.
        anew: Whether to forget first what was done before; rank 0's word counts.

    Raises:
        Stopped: A signal came; the last complete step is saved.
        SystemExit: The loss or a gradient is no number: said in one line, status 1, and the last
            good checkpoint is kept.
    """
    source = run.params.hellaswag
    read = hellaswag.read("train.evals.hellaswag", source) if source and world.first else None
    if anew and world.first:
        run.clear()
    tasks = world.broadcast(read)  # nobody looks into the run's folder before it is cleared
    run.check_not_failed()
    trainer, history = Trainer(run, world, tasks), run.history
    done = trainer.restore()
    if world.first:
        print(banner(trainer, done), flush=True)
        run.record()
        history.begin(done)
    trainer.join()
    peak = trainer.peak()
    if world.first:
        run.note_start(start_record(trainer, done, peak))
    meter = Meter(
        world,
        history,
        steps=run.params.steps,
        tokens=run.tokens,
        every=run.params.log_every,
        seconds=sum(history.last("seconds")),
        flops_per_token=flops_per_token(trainer.gpt.config, run.model.block_size),
        peak=peak,
        health=Health(skips=run.params.non_finite == "skip", skipped=sum(history.last("skipped"))),
    )
    batches = Batches(
        run.train_data,
        run.order,
        trainer.split,
        rank=world.rank,
        spans=(run.batches(step) for step in range(done, run.params.steps)),
        device=world.device,
    )
    with history, batches, trainer.writer, Interrupt(world) as interrupt, world.roll_call():
        try:
            advance(trainer, batches, meter, interrupt, done)
        except NonFinite as error:  # on all ranks alike, for they read the same reduced numbers
            if world.first:
                run.fail(str(error))
                said = f"error: {error}; the checkpoint before it is kept"
                print(said, file=sys.stderr, flush=True)
                trainer.writer.wait()
            world.barrier()  # torchrun stops the others as soon as one has left
            sys.exit(command.FAULT)
    if world.first:
        run.finish(summary(trainer, meter.seconds))
        run.publish(run.folder / directory.folder_name(run.params.steps))
    world.barrier()


def advance(
    trainer: Trainer, batches: Batches, meter: Meter, interrupt: Interrupt, done: int
) -> None:
    """The steps after ``done`` complete ones, validated and saved on the way."""
    params, saved = trainer.params, done

    def due(every: int) -> bool:
        return done % every == 0 or done == params.steps

    def validate() -> None:
        meter.settle()
        # Before the loss, which says that all of this is done when a run resumes.
        asked = params.hellaswag_every is not None and due(params.hellaswag_every)
        accuracy = trainer.answer(interrupt) if asked else None
        loss = trainer.validate(interrupt)
        meter.validation(done, loss, accuracy)
        if beside := trainer.run.beside_published(done, loss):
            meter.note(done, str(beside))
        meter.sample(done, trainer.sample())

    def save() -> None:
        nonlocal saved
        meter.settle()  # the numbers of the last step first: what is not finite is never saved
        if saved < done:
            trainer.save(done)
            saved = done

    try:
        if done and trainer.measured is None and due(params.val_every):  # stopped in the middle
            saved = done - 1
            validate()
            save()
            meter.resume_clock()
        while done < params.steps:
            learning_rate, numbers = trainer.step(done, batches, interrupt)
            done += 1
            meter.step(done, learning_rate, numbers, waited=batches.waited)
            if due(params.val_every):
                validate()  # also what is about to be saved
            if due(params.checkpoint_every):
                save()
            trainer.writer.check()
            meter.resume_clock()
    except Interrupted:
        save()
        trainer.writer.wait()
        trainer.world.barrier()  # who leaves first may be the end of all the others
        meter.note(done, "stopped by a signal" + ("; this step is saved" if done else ""))
        raise Stopped from None
