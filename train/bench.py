"""`python -m train.bench`: two minutes of the training step on this machine, and what to try.

The step is the training's own (`Trainer.step`, the loader, the agreement on signals), on the shards
of data/tokens, or on tokens made up here where there are none yet. It saves nothing, changes no
file, and starts a process for each GPU, as `train.launch` does. Under torchrun it joins.

    steps       one after the other, as in training: the time of each, and the wait for data
    parts       each by itself, the device idle before: what a step is made of
    kernels     of one step, by the profiler
    plan        what `train.plan` expects of this hardware
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.profiler import DeviceType, ProfilerActivity, profile

from model.command import Parser, count, positive
from model.size import flops_per_token
from pipeline import TokenStream
from pipeline.runtime import command
from pipeline.runtime.errors import Stopped, UserError
from pipeline.runtime.machine import Machine
from train.data.loader import Batches
from train.data.split import share_batch
from train.distributed import devices
from train.distributed.devices import device_type, processes_here
from train.distributed.interrupt import Interrupt, Interrupted
from train.distributed.rendezvous import process_group
from train.distributed.torchrun import run_torchrun
from train.distributed.world import World
from train.numerics import device_name, peak_memory, summed_loss
from train.plan.bench_report import Kernel, Measured, Watch, report, whole_batch
from train.preset import load
from train.run import TOKENS, Run
from train.trainer import Trainer

WARM_UP = 3  # steps before the first that counts
TRIES = 5  # of each part; the first does not count


class MadeUp:
    """Tokens of no text, where no shards lie yet: reading them costs what a fast disk costs."""

    def __init__(self, n: int = 1 << 24) -> None:
        self._tokens = np.random.default_rng(0).integers(0, 50257, n).astype(np.uint16)

    def __len__(self) -> int:
        return len(self._tokens)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Rows of ``length`` tokens, (len(starts), length)."""
        return self._tokens[starts[:, None] + np.arange(length)]


class Trial(Run):
    """A run that is tried only: it has no folder, and what it reads need not be verified."""

    @cached_property
    def folder(self) -> Path:
        """Where a run's checkpoints would go; nothing is written."""
        return Path(os.devnull)


class Clock:
    """Marks in a device's stream of work: the time between two is measured without stopping it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A mark behind all that is queued."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Waits until the device has come to a mark."""
        if self._cuda:
            mark.synchronize()

    def between(self, a: Any, b: Any) -> float:
        """Seconds between two marks that have been reached."""
        return a.elapsed_time(b) / 1e3 if self._cuda else b - a


def measure(trial: Trial, world: World, most: int, seconds: float) -> Measured:
    """Measures a run's step.

    Args:
        trial: What to compute.
        world: The processes; each calls this.
        most: Steps at most.
        seconds: After which no further step begins (three are taken in any case).
    """
    before, clock = time.perf_counter(), Clock(world.device)
    trainer = Trainer(trial, world)
    trainer.join()
    clock.wait(clock.mark())
    start = time.perf_counter() - before
    spans = (trial.batches(step) for step in itertools.count())
    batches = Batches(
        trial.train_data,
        trial.order,
        trainer.split,
        rank=world.rank,
        spans=spans,
        device=world.device,
    )
    peak = trainer.peak()
    with batches, Interrupt(world) as interrupt, Watch(world) as watch:

        def steps() -> Iterator[Any]:
            for number in itertools.count():
                trainer.step(number, batches, interrupt)
                yield clock.mark()

        stream = steps()
        marks = list(itertools.islice(stream, WARM_UP))
        clock.wait(marks[-1])
        marks, waited, begun = marks[-1:], batches.waited, time.perf_counter()
        while len(marks) <= most:
            marks.append(next(stream))
            clock.wait(marks[-2])  # as the training: one step ahead of the device
            late = time.perf_counter() - begun > seconds and len(marks) > 3
            if world.any(late):
                break
        clock.wait(marks[-1])
        clocks = watch.state()
        took = [clock.between(a, b) for a, b in itertools.pairwise(marks)]
        waited = batches.waited - waited
        memory = peak_memory(world.device)
        kernels = _kernels(lambda: next(stream), clock, world)
        parts = _parts(trainer, next(batches), clock)
    tokens = trial.batches.full * trial.model.block_size
    flops = tokens * flops_per_token(trainer.gpt.config, trial.model.block_size)
    cuda = world.device.type == "cuda"
    return Measured(
        device=device_name(world.device),
        world=world.size,
        compiled=trainer.compiled,
        micro_batch=trainer.split.micro_batch,
        micro_steps=trainer.split.micro_steps(trial.batches.full),
        made_up=isinstance(trial.train_data, MadeUp),
        start=start,
        steps=took,
        tokens=tokens,
        data_wait=waited / sum(took),
        mfu=flops / statistics.median(took) / peak if peak else None,
        peak=peak,
        memory=memory,
        reserved=torch.cuda.max_memory_reserved() if cuda else None,
        total=torch.cuda.mem_get_info()[1] if cuda else None,
        parts=parts,
        reduced=4 * _numbers(trainer) if world.size > 1 else 0,
        kernels=kernels,
        clocks=clocks,
    )


def _numbers(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.named.values())


def _parts(trainer: Trainer, batch: tuple[Tensor, Tensor], clock: Clock) -> dict[str, float]:
    """Seconds of each part of a step by itself: medians."""
    run, world = trainer.run, trainer.world
    gradients = torch.zeros(_numbers(trainer) if world.size > 1 else 1, device=world.device)

    def micro_step() -> None:
        with trainer.ddp.no_sync():
            summed_loss(trainer.ddp, *batch, run.params.dtype).backward()

    def clip() -> None:
        most = run.params.grad_clip or float("inf")
        torch.nn.utils.clip_grad_norm_(trainer.named.values(), most)

    def seconds(part: Callable[[], Any]) -> float:
        taken = []
        for _ in range(TRIES):
            clock.wait(before := clock.mark())
            before = clock.mark()
            part()
            clock.wait(after := clock.mark())
            taken.append(clock.between(before, after))
        return statistics.median(taken[1:])

    micro_steps = trainer.split.micro_steps(run.batches.full)
    return {
        "forward and backward": micro_steps * seconds(micro_step),
        "all-reduce": seconds(lambda: world.sum(gradients)) if world.size > 1 else 0.0,
        "clipping": seconds(clip),
        "optimizer": seconds(trainer.optimizer.step),
        "zeroing": seconds(lambda: trainer.optimizer.zero_grad(set_to_none=False)),
    }


def _kernels(step: Callable[[], Any], clock: Clock, world: World) -> list[Kernel]:
    """What rank 0's device does in a step, the longest first; all ranks take the step."""
    cuda = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiler = profile(activities=activities) if world.first else nullcontext()
    with profiler:
        clock.wait(step())
    if not world.first:
        return []
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"  # microseconds
    found = [
        Kernel(event.key, event.count, getattr(event, kind) / 1e6)
        for event in cast(profile, profiler).key_averages()
        if (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def main(argv: Sequence[str] = ()) -> None:
    """Times the training step on this machine, and says what to try."""
    args = _parser().parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    params, machine = load(args.preset), Machine.load()
    params.train.batches(params.model.block_size)
    kind = device_type(machine.device)
    processes = processes_here(machine, kind)
    tried, micro_batch = whole_batch(params, args.batch_tokens or params.train.batch_tokens), None
    if not args.batch_tokens:  # the training's, which also divides its batch while that grows
        world_size = int(os.environ.get("WORLD_SIZE", processes))
        split = share_batch(params.model, params.train, world_size, machine.micro_batch, kind)
        micro_batch = split.micro_batch
    shards = (TOKENS / "manifest.json").exists()
    data = TokenStream(TOKENS, "train") if shards else cast(TokenStream, MadeUp())
    trial = Trial(
        model=tried.model,
        params=tried.train.model_copy(update={"steps": sys.maxsize}),  # it stops by the clock
        machine=machine.model_copy(update={"micro_batch": micro_batch or machine.micro_batch}),
        train_data=data,
        val_data=data,
        code_key="",
    )
    trial.split(processes, kind)
    if kind == "cuda":
        devices.check(trial.params.dtype, trial.compiles(kind))
    if "RANK" not in os.environ and processes > 1:
        run_torchrun(processes, module="train.bench", arguments=argv)
        return
    with process_group(machine.device, machine.timeout) as world:
        try:
            measured = measure(trial, world, args.steps, args.seconds)
        except Interrupted:
            raise Stopped from None
    if world.first:
        print(report(measured, params, machine), flush=True)
        if args.json:
            args.json.write_text(json.dumps(asdict(measured), indent=2) + "\n")


def _parser() -> Parser:
    parser = Parser(prog="python -m train.bench", description=main.__doc__)
    add = parser.add_argument
    add("--preset", metavar="NAME", help="lay this preset over params.yaml, which stays as it is")
    add("--batch-tokens", type=count, metavar="N", help="for train.batch_tokens (slow machines)")
    add("--seconds", type=positive, default=60.0, metavar="S", help="of steps (default 60)")
    add("--steps", type=count, default=1000, metavar="N", help="at most (default 1000)")
    add("--json", type=Path, metavar="FILE", help="all of it, for machines")
    return parser


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
