"""The training loop: from the newest checkpoint to the published model."""

from __future__ import annotations

import sys

from model.size import flops_per_token
from pipeline.runtime import command
from pipeline.runtime.errors import Stopped
from train.checkpoint import directory
from train.data.loader import Batches
from train.data.shard_check import ShardCheck
from train.distributed.interrupt import Interrupt, Interrupted
from train.distributed.world import World
from train.evals import hellaswag
from train.invariant import InvariantTrainer
from train.monitor.drift import Drift, check_same_weights
from train.monitor.health import Health, NonFinite
from train.monitor.meter import Meter
from train.run import Run
from train.run_summary import banner, start_record, summary
from train.trainer import Trainer
from train.validation import source_parts

STOP_SECONDS = 10.0  # for hashing the last shards after a signal, of torchrun's 30 s


def train(run: Run, world: World, *, fresh: bool = False) -> None:
    """Train a run to its end, from its newest checkpoint, and publish it.

    Args:
        run: The run.
        world: The processes.
        fresh: Whether to delete what was done before; rank 0 decides.

    Raises:
        Stopped: A signal came; the last complete step is saved.
        SystemExit: A loss or gradient is non-finite, or the weights of the ranks differ: one line
            on stderr, status 1, and the last good checkpoint is kept.
    """
    source = run.params.hellaswag
    read = hellaswag.read("train.hellaswag", source) if source and world.first else None
    if fresh and world.first:
        run.clear()
    tasks = world.broadcast(read)  # no rank looks into the run's folder before it is cleared
    run.check_not_failed()
    kind = InvariantTrainer if run.params.invariant else Trainer
    trainer, history = kind(run, world, tasks), run.history
    done = trainer.restore()
    if world.first:
        print(banner(trainer, done), flush=True)
        run.record()
        history.begin(done)
    trainer.warm_up()
    peak = trainer.peak()
    if world.first:
        run.forget_failure()
        run.note_start(start_record(trainer, done, peak))
    meter = Meter(
        world,
        history,
        steps=run.params.steps,
        tokens=run.tokens,
        every=run.params.log_every,
        val_tokens=run.params.val_tokens,
        seconds=sum(history.last("seconds")),
        flops_per_token=flops_per_token(trainer.gpt.config, run.model.block_size),
        peak=peak,
        health=Health(
            skips=run.params.non_finite == "skip",
            skips_overflows=trainer.scaler.is_enabled(),
            skipped=sum(history.last("skipped")),
        ),
    )
    batches = Batches(
        run.train_data,
        run.order,
        trainer.split,
        rank=world.rank,
        spans=run.batches.spans(done, run.params.steps),
        device=world.device,
    )
    shards = ShardCheck(world, run.train_data)
    with history, shards, batches, trainer.writer, Interrupt(world) as interrupt, world.roll_call():
        try:
            train_steps(trainer, batches, shards, meter, interrupt, done)
        except (NonFinite, Drift) as error:  # on all ranks, which read the same numbers
            if world.first:
                then = ""
                if isinstance(error, NonFinite):
                    run.fail(str(error))
                    then = "; run the same command again to see the ways to continue"
                print(
                    f"error: {error}; the last checkpoint is kept{then}",
                    file=sys.stderr,
                    flush=True,
                )
                trainer.writer.wait()
            world.barrier()  # torchrun stops the others as soon as one exits
            sys.exit(command.FAULT)
    if world.first:
        run.finish(summary(trainer, meter.seconds))
        run.publish(run.folder / directory.folder_name(run.params.steps))
    world.barrier()


def train_steps(
    trainer: Trainer,
    batches: Batches,
    shards: ShardCheck,
    meter: Meter,
    interrupt: Interrupt,
    done: int,
) -> None:
    """Train the steps after ``done`` complete ones, with validations and checkpoints."""
    params, saved = trainer.params, done
    parts = source_parts(trainer.run.val_data, params.val_tokens)

    def due(every: int) -> bool:
        return done % every == 0 or done == params.steps

    def validate() -> None:
        meter.flush()
        # HellaSwag before the loss: a checkpoint that has a loss is not measured again on resume.
        scores = params.hellaswag_every is not None and due(params.hellaswag_every)
        accuracy = trainer.score_hellaswag(interrupt) if scores else None
        loss = trainer.validate(interrupt)
        of_sources = {name: trainer.loss_on(*part, interrupt) for name, part in parts.items()}
        meter.log_validation(done, loss, accuracy, of_sources)
        if beside := trainer.run.beside_reference(done, loss):
            meter.print_line(done, str(beside))
        meter.log_sample(done, trainer.sample())

    def save() -> None:
        nonlocal saved
        meter.flush()  # raises where the last step is non-finite, which is never saved
        if saved < done:
            while not shards.complete(seconds=1.0):
                interrupt.check()
            check_same_weights(trainer.replicas(), trainer.world, done)
            trainer.save(done)
            saved = done

    try:
        if done and trainer.measured is None and due(params.val_every):
            saved = done - 1  # save again, with the loss
            validate()
            save()
            meter.restart_clock()
        while done < params.steps:
            learning_rate, numbers = trainer.step(done, batches, interrupt)
            done += 1
            meter.step(done, learning_rate, numbers, waited=batches.waited)
            if due(params.val_every):
                validate()  # before the save, which records the loss
            if due(params.checkpoint_every):
                save()
            trainer.writer.check()
            shards.check()
            meter.restart_clock()
    except Interrupted:
        if shards.complete(seconds=STOP_SECONDS):
            save()
        trainer.writer.wait()
        trainer.world.barrier()  # torchrun stops the others as soon as one exits
        is_saved = done > 0 and saved == done
        meter.print_line(done, "stopped by a signal" + "; this step is saved" * is_saved)
        raise Stopped from None
