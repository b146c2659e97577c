"""Micro-batch and loss chunk that training takes on a GPU, chosen from its memory.

A larger micro-batch needs fewer passes over the gradients, a larger chunk of the loss fewer over
the gradient of the token table (`step_time.traffic`); both take memory (`memory.training_memory`).
The choice is the pair that fits and moves the fewest bytes per step. It depends on the run and on
the size that a GPU is sold with, not on what happens to be free, so that all cards of a kind give
the same rounding. Keys that machine.yaml sets are taken as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from train.data.split import Split, divisors, share_batch
from train.params import ModelParams, TrainParams
from train.plan.memory import CUDA_RESERVE, FRAGMENTATION, training_memory
from train.plan.step_time import traffic

GIB = 2**30

SOLD = (4, 5, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 141, 180, 192, 288)
"""Sizes of GPUs, GiB. A card reports up to a tenth less: 22.0 (L4) or 23.5 (RTX 4090) of 24."""

REPORTED = 0.9
"""Fraction of a size in `SOLD` that each card of that size has at least."""

MOST_TOKENS = 65_536
"""Tokens of the largest micro-batch. Beyond it, on an A100, less than 1 % of a step is left to save
with GPT-2 124M, and a signal waits for the end of a micro-batch: 0.4 s."""

CHUNKS = (8192, 4096)
"""Tokens per chunk of the loss to choose from, besides the default of `model.loss.Chunks`."""


class Settings(Protocol):
    """The keys of machine.yaml that count here."""

    @property
    def micro_batch(self) -> int | None:
        """Sequences per forward pass; None: choose."""

    @property
    def loss_chunk(self) -> int | None:
        """Tokens per chunk of the loss; None: choose."""

    @property
    def checkpoint_activations(self) -> bool:
        """Whether activations are computed again."""


def nominal_memory(total: float) -> float:
    """The size in `SOLD` of a GPU that reports ``total`` bytes, in bytes."""
    return next((size * GIB for size in SOLD if size * GIB >= total), total)


def usable_memory(total: float) -> float:
    """Bytes that a run may plan with on a GPU that reports ``total`` bytes."""
    return min(REPORTED * nominal_memory(total), total) * (1 - FRAGMENTATION)


def choose(
    model: ModelParams,
    params: TrainParams,
    settings: Settings,
    world_size: int,
    memory: float | None,
) -> tuple[Split, int | None]:
    """Choose what the settings leave open.

    Args:
        params: With `dtype` resolved.
        settings: Of machine.yaml, or the options of a plan.
        memory: Bytes that the smallest GPU of the run reports; None on a CPU.

    Returns:
        The split of the batch, and the tokens per chunk of the loss (None: chosen by the model).

    Raises:
        UserError: There is no even split.
    """
    kind = "cpu" if memory is None else "cuda"
    usual = share_batch(model, params, world_size, settings.micro_batch, kind)
    if memory is None:
        return usual, settings.loss_chunk
    if params.invariant:  # the same on every GPU: the chunk decides bits
        return usual, CHUNKS[0]
    config, dtype = model.config(), params.matmul_dtype()
    per_process = params.batches(model.block_size).smallest // world_size
    sizes = [settings.micro_batch] if settings.micro_batch else divisors(per_process)
    best = usual if settings.micro_batch else replace(usual, micro_batch=1), settings.loss_chunk
    fewest = float("inf")
    for size in sizes:
        if size > 1 and size * model.block_size > MOST_TOKENS and not settings.micro_batch:
            break
        for chunk in (settings.loss_chunk,) if settings.loss_chunk else (None, *CHUNKS):
            sized = replace(config, loss_chunk=chunk)
            needed = training_memory(
                sized,
                size,
                dtype,
                optimizer=params.optimizer,
                checkpoint_activations=settings.checkpoint_activations,
                reserve=CUDA_RESERVE,
            )
            moved = per_process // size * traffic(sized, size, dtype)
            if needed.total <= usable_memory(memory) and moved < fewest:
                best, fewest = (replace(usual, micro_batch=size), chunk), moved
    return best


def out_of_memory(rows: int, block_size: int, device: str, *, invariant: bool = False) -> str:
    """Message for a device, by name, that has too little memory for a micro-batch."""
    key = (
        "params.yaml: train.invariant"
        if invariant
        else "micro_batch (machine.yaml, GPT2_MICRO_BATCH)"
    )
    smaller = [n for n in divisors(rows) if n < rows]
    result = "another run, which rounds differently" if invariant else "the same result"
    fix = (
        f"set {smaller[-1]} ({result}, in more micro-steps)"
        if smaller
        else "take a smaller model or model.block_size"
    )
    return (
        f"{key}: {rows} sequences of {block_size} tokens at a time need more memory than {device} "
        f"has; {fix}"
    )
