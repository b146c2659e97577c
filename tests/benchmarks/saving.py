"""What saving costs the training: `python -m tests.benchmarks.saving`, some 4 minutes.

A GPT-2 of 124M parameters trains on the CPU, one sequence of 1,024 tokens a step, as `python -m
train` does it. Some steps follow a save, and as many follow none, in turns; what the former take
longer, the save itself included, is what a save costs. It is compared with 50 steps; and with a
save that is waited for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.support.training import make_project
from train.data.loader import Batches
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.run import Run
from train.trainer import Trainer

TOKENS = 1024  # one sequence of the published context


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9, help="after each save, and after none")
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        sizes = {"size": "gpt2", "n_layer": None, "n_head": None, "n_embd": None}
        project.write(
            model={**sizes, "block_size": TOKENS},
            train={"batch_tokens": TOKENS, "dtype": "bfloat16", "steps": 10**6},
        )
        os.chdir(folder)
        measure(args.turns, args.steps, args.every)


def measure(turns: int, steps: int, every: int) -> None:
    """Prints what a save costs."""
    run = Run.open()
    with process_group("cpu") as world, run.lock():
        trainer = Trainer(run, world)
        done = trainer.restore()
        trainer.join()
        batches = Batches(
            run.train_data, run.order, trainer.split, rank=0, device=world.device,
            spans=map(run.batches, itertools.count()),
        )  # fmt: skip
        with batches, trainer.writer, Interrupt(world) as interrupt:

            def train(n: int, save: bool) -> float:
                nonlocal done
                start = time.perf_counter()
                if save:
                    trainer.save(done)
                    copied.append(time.perf_counter() - start)
                for _ in range(n):
                    _, numbers = trainer.step(done, batches, interrupt)
                    numbers.tolist()
                    done += 1
                    trainer.writer.check()
                return time.perf_counter() - start

            copied: list[float] = []
            train(3, save=True)  # the first step allocates, and the first save too
            without, with_save = [], []
            for _ in range(turns):
                without.append(train(steps, save=False))
                with_save.append(train(steps, save=True))
            trainer.writer.wait()
            start, used = time.perf_counter(), thread_seconds(trainer)
            trainer.save(done)
            trainer.writer.wait()
            waited, used = time.perf_counter() - start, thread_seconds(trainer) - used
    step = statistics.median(without) / steps
    costs = [b - a for a, b in zip(without, with_save, strict=True)]
    cost = statistics.median(costs)
    print(f"a step of {TOKENS} tokens: {step:.2f} s ({TOKENS / step:.0f} tokens/s)")
    print(f"the copy: {statistics.median(copied[1:]):.2f} s (the first: {copied[0]:.2f} s)")
    print(f"a save waited for: {waited:.2f} s, {waited / step / every:.1%} of {every} steps")
    cores = torch.get_num_threads()
    share = used / (cores * step * every)
    print(f"the thread's processor time: {used:.2f} s, {share:.1%} of that of {every} steps")
    said = ", ".join(f"{c:.2f}" for c in sorted(costs))
    print(f"a save beside the training: {cost:.2f} s ({said}), {cost / step / every:.1%}")


def thread_seconds(trainer: Trainer) -> float:
    """Processor time that the writer's thread has used."""
    return trainer.writer._pool.submit(time.thread_time).result()


if __name__ == "__main__":
    main()
