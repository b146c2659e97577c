"""What the training loop costs beyond the step: `python -m tests.benchmarks.loop`.

The *bare step* is forward, backward, clipping and fused AdamW of the plain model on one batch, in
a process without DDP, loader, log or checkpoints. The *loop* is `python -m train.launch` with one
process, as many threads, and the model and batch of the preset `mini`, on random tokens; its speed
is what it logs. They take turns; medians. With two processes the loop also sends gradients, and
each has half of the threads.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from model import GPT
from pipeline.machine import usable_cores
from tests.train.conftest import make_project
from train.arithmetic import summed_loss
from train.history import History
from train.optimizer import adamw, decay_groups
from train.params import ModelParams, TrainParams
from train.preset import read_preset


def bare(seconds: float) -> None:
    """Prints the tokens a second of the bare step, as the median of its steps."""
    torch.set_num_threads(usable_cores())
    mini = read_preset("mini")
    model, train = ModelParams(**mini["model"]), TrainParams(**mini["train"])
    gpt = GPT.initialised(model.config())
    groups = decay_groups(gpt.named_parameters(), embeddings_decay=True)
    optimizer = adamw(groups, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    shape = (train.batch_tokens // model.block_size, model.block_size)
    inputs, targets = torch.randint(50257, (2, *shape)).unbind()
    times = []
    end = time.perf_counter() + seconds
    while (before := time.perf_counter()) < end:
        loss = summed_loss(gpt, inputs, targets, train.dtype) / train.batch_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        times.append(time.perf_counter() - before)
    print(train.batch_tokens / statistics.median(times[3:]))


def loop(processes: int, steps: int) -> tuple[float, float]:
    """Tokens a second of the loop, and the part of its time that it waited for data."""
    mini = read_preset("mini")
    short = {"steps": steps, "warmup_steps": 5, "val_every": 10**6, "val_tokens": 1024,
             "checkpoint_every": 10**6, "log_every": 5}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        project.write(model=mini["model"], train={**mini["train"], **short})
        project.write_data(n_train=2_000_000)
        project.train(processes)
        history = History(project.run_folder / "log.jsonl", Path(folder) / "none")
        logged: list[dict[str, Any]] = [r for r in history.records if "data_wait" in r][2:]
    speed = statistics.median(record["tokens_per_second"] for record in logged)
    return speed, statistics.median(record["data_wait"] for record in logged)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loop", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of the loop, a round")
    parser.add_argument("--bare", type=float, metavar="SECONDS", help="only the bare step")
    args = parser.parse_args()
    if args.bare:
        bare(args.bare)
        return
    command = [sys.executable, "-m", "tests.benchmarks.loop", "--bare", "12"]
    steps, ratios = [], []
    for _ in range(args.rounds):
        step = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        speed, wait = loop(1, args.steps)
        steps.append(step)
        ratios.append(speed / step)
        print(
            f"bare step {step:,.0f} tokens/s, loop {speed:,.0f}: {speed / step:.1%}, "
            f"data wait {wait:.2%} of the step",
            flush=True,
        )
    two, wait = loop(2, args.steps)
    print(f"loop with 2 processes {two:,.0f} tokens/s, data wait {wait:.2%}")
    print(f"median: the loop has {statistics.median(ratios):.1%} of the bare step's speed")
    sys.exit(int(statistics.median(ratios) < 0.95))


if __name__ == "__main__":
    main()
