"""Overhead of the training loop: `python -m tests.benchmarks.loop`.

The *bare step* is forward, backward, clipping and fused AdamW of the plain model on one batch: no
DDP, loader, log or signal check. The *loop* is `train.loop.train` of the preset `mini` on random
tokens. Both alternate in one process, so that a slow phase of the machine slows both: a bare step
of a second model runs before each step of the loop, and the time between two bare steps is the
loop's. Validations and saves are excluded. Exits with status 1 if the loop is below 95 % of the
bare step's speed or waits for data more than 1 % of the time.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model import GPT
from tests.support.training import make_project
from train.distributed.rendezvous import process_group
from train.loop import train
from train.numerics import clip_gradients, summed_loss
from train.optim.param_groups import adamw, decay_groups
from train.preset import read_preset
from train.run import Run
from train.trainer import Trainer


def bare_step(run: Run) -> Callable[[], None]:
    """Make the bare step of a run, with its full batch as one micro-batch."""
    gpt = GPT.initialised(run.model.config())
    groups = decay_groups(gpt.named_parameters(), embeddings_decay=True)
    optimizer = adamw(groups, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    shape = (run.batches.full, run.model.block_size)
    inputs, targets = torch.randint(50257, (2, *shape)).unbind()

    def step() -> None:
        loss = summed_loss(gpt, inputs, targets, run.dtype) / run.params.batch_tokens
        loss.backward()
        clip_gradients(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def measure(steps: int) -> tuple[list[float], list[float], float]:
    """Run the project in the working directory.

    Returns:
        Seconds of each bare step; seconds of each step of the loop; fraction of the loop's step
        spent waiting for data.
    """
    run, bare, looped = Run.open(), [], []
    bare_one, original, mark = bare_step(run), Trainer.step, 0.0

    def step(self: Trainer, *args: Any) -> Any:
        nonlocal mark
        before = time.perf_counter()
        looped.append(before - mark)  # all that the loop did since the last bare step
        bare_one()
        mark = time.perf_counter()
        bare.append(mark - before)
        return original(self, *args)

    Trainer.step = step  # type: ignore[method-assign, assignment]
    with process_group("cpu") as world, run.lock():
        train(run, world)
    waits = [r["data_wait"] * r["step_seconds"] for r in run.history.records if "data_wait" in r]
    return bare[3:], looped[4:], statistics.median(waits) / statistics.median(looped[4:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loop", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    mini = read_preset("mini")
    rare = {"steps": args.steps, "val_every": 10**6, "val_tokens": 1024, "checkpoint_every": 10**6}
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        project.write(model=mini["model"], train={**mini["train"], **rare})
        project.write_data(n_train=2_000_000)
        os.chdir(folder)
        os.environ["GPT2_MICRO_BATCH"] = str(mini["train"]["batch_tokens"] // 128)
        bare, looped, wait = measure(args.steps)
        os.chdir("/")
    tokens = mini["train"]["batch_tokens"]
    speeds = [tokens / statistics.median(times) for times in (bare, looped)]
    # Compare each bare step with the loop's step after it.
    ratio = statistics.median(b / a for b, a in zip(bare, looped, strict=False))
    print(
        f"{torch.get_num_threads()} threads: bare step {speeds[0]:,.0f} tokens/s, loop "
        f"{speeds[1]:,.0f} ({ratio:.1%}, median of pairs); data wait {wait:.3%} of the loop's step"
    )
    sys.exit(int(ratio < 0.95 or wait > 0.01))


if __name__ == "__main__":
    main()
