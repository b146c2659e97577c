"""`python -m train.bench`: time the training step on this machine and suggest settings to try.

The benchmark runs the real training step (`Trainer.step`, the loader, the agreement on signals) on
the shards of data/tokens, or on random tokens if there are none. It changes no file, and starts one
process per GPU like `train.launch`; under torchrun it joins the processes that torchrun started.

    steps       one after the other, as in training: time per step, and data wait
    parts       each part of a step alone, on an idle device
    kernels     of one step, from the profiler
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
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from model.command import count, positive
from model.size import flops_per_token
from pipeline import TokenStream
from pipeline.runtime import command
from pipeline.runtime.errors import Stopped, UserError
from pipeline.runtime.machine import Machine
from train.data.loader import Batches, MicroBatch
from train.distributed.compiler import check_compiler
from train.distributed.devices import check_gpu, device_type, processes_here
from train.distributed.group import read_group, under_torchrun
from train.distributed.interrupt import Interrupt, Interrupted
from train.distributed.rendezvous import process_group
from train.distributed.torchrun import run_torchrun
from train.distributed.world import World
from train.invariant import InvariantTrainer
from train.numerics import (
    clip_gradients,
    device_name,
    gpu_memory,
    native_dtype,
    peak_memory,
    summed_loss,
)
from train.plan.bench_report import GpuMonitor, Kernel, Measurement, constant_batch, report
from train.plan.fit import choose
from train.preset import load
from train.run import TOKENS, Run
from train.trainer import Trainer

WARM_UP = 3  # steps that are not timed
REPEATS = 5  # of each part; the first is not timed


class RandomTokens:
    """Token stream in memory, used if there are no shards: as fast as a fast disk."""

    def __init__(self, n: int = 1 << 24) -> None:
        self._tokens = np.random.default_rng(0).integers(0, 50257, n).astype(np.uint16)

    def __len__(self) -> int:
        return len(self._tokens)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return rows of ``length`` tokens, (len(starts), length) uint16."""
        return self._tokens[starts[:, None] + np.arange(length)]


class BenchRun(Run):
    """Run that is only timed: it writes nothing, and its data need not be verified."""

    @cached_property
    def folder(self) -> Path:
        """Folder of the checkpoints: none."""
        return Path(os.devnull)


class Clock:
    """Time between marks in a device's queue of work, measured without a synchronization."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Put a mark behind all work that is queued."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the device has reached a mark."""
        if self._cuda:
            mark.synchronize()

    def elapsed(self, a: Any, b: Any) -> float:
        """Return the seconds between two marks that the device has reached."""
        seconds: float = a.elapsed_time(b) / 1e3 if self._cuda else b - a
        return seconds


def measure(run: BenchRun, world: World, max_steps: int, seconds: float) -> Measurement:
    """Measure the step of a run; every rank must call it.

    After ``seconds`` or ``max_steps`` timed steps no further step begins; at least three are timed.
    """
    before, clock = time.perf_counter(), Clock(world.device)
    trainer = InvariantTrainer(run, world) if run.params.invariant else Trainer(run, world)
    trainer.warm_up()
    clock.wait(clock.mark())
    start = time.perf_counter() - before
    batches = Batches(
        run.train_data,
        run.order,
        trainer.split,
        rank=world.rank,
        spans=run.batches.spans(0),
        device=world.device,
    )
    peak = trainer.peak()
    with batches, Interrupt(world) as interrupt, GpuMonitor(world) as monitor:

        def steps() -> Iterator[Any]:
            for number in itertools.count():
                trainer.step(number, batches, interrupt)
                yield clock.mark()

        stream = steps()
        marks = list(itertools.islice(stream, WARM_UP))
        clock.wait(marks[-1])
        marks, waited, begun = marks[-1:], batches.waited, time.perf_counter()
        while len(marks) <= max_steps:
            marks.append(next(stream))
            clock.wait(marks[-2])  # as in training: one step ahead of the device
            if world.any(time.perf_counter() - begun > seconds and len(marks) > 3):
                break
        clock.wait(marks[-1])
        clocks = monitor.stop()
        times = [clock.elapsed(a, b) for a, b in itertools.pairwise(marks)]
        waited = batches.waited - waited
        memory = peak_memory(world.device)
        kernels = _kernels(lambda: next(stream), clock, world)
        parts = _parts(trainer, next(batches), clock)
    tokens = run.batches.full * run.model.block_size
    flops = tokens * flops_per_token(trainer.gpt.config, run.model.block_size)
    cuda = world.device.type == "cuda"
    return Measurement(
        device=device_name(world.device),
        world=world.size,
        compiled=trainer.compiled,
        micro_batch=trainer.split.micro_batch,
        micro_steps=trainer.split.micro_steps(run.batches.full),
        loss_chunk=trainer.gpt.loss_chunk,
        made_up=isinstance(run.train_data, RandomTokens),
        start=start,
        steps=times,
        tokens=tokens,
        data_wait=waited / sum(times),
        mfu=flops / statistics.median(times) / peak if peak else None,
        peak=peak,
        memory=memory,
        reserved=torch.cuda.max_memory_reserved() if cuda else None,
        total=torch.cuda.mem_get_info()[1] if cuda else None,
        parts=parts,
        reduced=4 * _parameter_count(trainer) if world.size > 1 else 0,
        kernels=kernels,
        clocks=clocks,
    )


def _parameter_count(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.named.values())


def _parts(trainer: Trainer, batch: MicroBatch, clock: Clock) -> dict[str, float]:
    """Return the median time of each part of a step, measured alone, in seconds."""
    run, world = trainer.run, trainer.world
    gradients = torch.zeros(_parameter_count(trainer) if world.size > 1 else 1, device=world.device)

    def micro_step() -> None:
        if isinstance(trainer, InvariantTrainer):
            summed_loss(trainer.forward, batch.inputs, batch.targets, run.dtype).backward()
            return
        with trainer.ddp.no_sync():
            summed_loss(trainer.ddp, batch.inputs, batch.targets, run.dtype).backward()

    def clip() -> None:
        clip_gradients(trainer.named.values(), run.params.grad_clip)

    def seconds(part: Callable[[], Any]) -> float:
        times = []
        for _ in range(REPEATS):
            clock.wait(clock.mark())
            before = clock.mark()
            part()
            clock.wait(after := clock.mark())
            times.append(clock.elapsed(before, after))
        return statistics.median(times[1:])

    micro_steps = trainer.split.micro_steps(run.batches.full)
    return {
        "forward and backward": micro_steps * seconds(micro_step),
        "all-reduce": seconds(lambda: world.sum(gradients)) if world.size > 1 else 0.0,
        "clipping": seconds(clip),
        "optimizer": seconds(trainer.optimizer.step),
        "zeroing": seconds(lambda: trainer.optimizer.zero_grad(set_to_none=False)),
    }


def _kernels(step: Callable[[], Any], clock: Clock, world: World) -> list[Kernel]:
    """Profile one step on rank 0, the longest kernels first; every rank must call it."""
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
    """Time the training step on this machine for a minute and suggest settings to try."""
    args = _parser().parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: no folder {args.json.parent}; create it")
    params, machine = load(args.preset), Machine.load()
    params = replace(params, train=params.train.resolved(native_dtype(machine.device)))
    params.train.batches(params.model.block_size)
    kind = device_type(machine.device)
    processes = processes_here(machine, kind)
    timed = constant_batch(params, args.batch_tokens or params.train.batch_tokens)
    settings = machine
    if not args.batch_tokens:  # the micro-batch of training, which divides its smallest batch
        world_size = read_group().size if under_torchrun() else processes
        memory = gpu_memory(torch.device(kind))
        split, chunk = choose(params.model, params.train, machine, world_size, memory)
        chosen = {"micro_batch": split.micro_batch, "loss_chunk": chunk}
        settings = machine.model_copy(update=chosen)
    shards = (TOKENS / "manifest.json").exists()
    data = TokenStream(TOKENS, "train") if shards else cast(TokenStream, RandomTokens())
    run = BenchRun(
        model=timed.model,
        params=timed.train,
        machine=settings,
        train_data=data,
        val_data=data,
        code_key="",
    )
    run = replace(  # compiled as in training, but without an end: `measure` stops earlier
        run,
        machine=run.machine.model_copy(update={"compile": run.compiles(kind)}),
        params=run.params.model_copy(update={"steps": sys.maxsize, "mixture": None}),
    )
    run.split(processes, kind)
    if kind == "cuda":
        check_gpu(run.dtype, run.compiles(kind))
    if not under_torchrun() and processes > 1:
        if run.compiles(kind):
            check_compiler(kind)
        run_torchrun(processes, module="train.bench", arguments=argv)
        return
    with process_group(machine.device, machine.timeout) as world:
        if run.compiles(kind):  # imports torch's compiler, which reads what the group has set
            check_compiler(kind)
        try:
            measured = measure(run, world, args.steps, args.seconds)
        except Interrupted:
            raise Stopped from None
    if world.first:
        print(report(measured, params, machine), flush=True)
        if args.json:
            args.json.write_text(json.dumps(asdict(measured), indent=2) + "\n")


def _parser() -> command.Parser:
    parser = command.Parser(prog="python -m train.bench", description=main.__doc__)
    add = parser.add_argument
    add("--preset", metavar="NAME", help="merge this preset; params.yaml itself stays unchanged")
    add("--batch-tokens", type=count, metavar="N", help="instead of train.batch_tokens (slow CPUs)")
    add("--seconds", type=positive, default=60.0, metavar="S", help="time limit (default 60)")
    add("--steps", type=count, default=1000, metavar="N", help="steps at most (default 1000)")
    add("--json", type=Path, metavar="FILE", help="write all measurements as JSON")
    return parser


if __name__ == "__main__":
    command.run_and_leave(lambda: main(sys.argv[1:]))
