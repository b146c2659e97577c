"""Cost of saving checkpoints: `python -m tests.benchmarks.saving`, about 4 minutes.

A GPT-2 of 124M parameters trains on the CPU, one sequence of 1,024 tokens per step, as with `python
-m train`. Groups of steps with a save at their start alternate with groups without one. The cost of
a save is the difference of their times, printed as a fraction of 50 steps, and beside the time of a
save that is waited for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.support.training import batches, make_project
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.run import Run
from train.trainer import Trainer

TOKENS = 1024  # one sequence of the published context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9, help="steps per group (default 9)")
    parser.add_argument(
        "--every", type=int, default=50, help="steps between saves of a real run (default 50)"
    )
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
    """Print the cost of a save."""
    run = Run.open()
    with process_group("cpu") as world, run.lock():
        trainer = Trainer(run, world)
        done = trainer.restore()
        trainer.warm_up()
        loader = batches(run, trainer, 0)
        with loader, trainer.writer, Interrupt(world) as interrupt:

            def train(n: int, save: bool) -> float:
                nonlocal done
                start = time.perf_counter()
                if save:
                    trainer.save(done)
                    copied.append(time.perf_counter() - start)
                for _ in range(n):
                    _, numbers = trainer.step(done, loader, interrupt)
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
    print(f"step of {TOKENS} tokens: {step:.2f} s ({TOKENS / step:.0f} tokens/s)")
    print(f"copy: {statistics.median(copied[1:]):.2f} s (the first: {copied[0]:.2f} s)")
    print(f"save, waited for: {waited:.2f} s, {waited / step / every:.1%} of {every} steps")
    cores = torch.get_num_threads()
    share = used / (cores * step * every)
    print(f"CPU time of the thread: {used:.2f} s, {share:.1%} of that of {every} steps")
    each = ", ".join(f"{c:.2f}" for c in sorted(costs))
    print(f"save during training: {cost:.2f} s ({each}), {cost / step / every:.1%}")


def thread_seconds(trainer: Trainer) -> float:
    """Return the CPU time of the writer's thread in seconds."""
    return trainer.writer._pool.submit(time.thread_time).result()


if __name__ == "__main__":
    main()
