"""How a global batch is split among processes and micro-steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.size import flops_per_token
from pipeline.runtime.errors import UserError
from train.params import ModelParams, TrainParams

# Tokens per micro-batch where machine.yaml sets none: enough to fill the processor, and few enough
# for any memory.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

# A step can be interrupted only between micro-batches, so on a CPU one must take no more than some
# seconds of a core: GPT-2 124M computes one sequence of 1,024 tokens at a time.
MICRO_BATCH_FLOPS = {"cpu": 5e11, "cuda": math.inf}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which process computes which samples of a global batch, and in which micro-step.

        sample of (micro-step m, rank r, row b) = start + (m * world + r) * micro_batch + b

    With ``contiguous``, a rank has consecutive micro-batches, of which some ranks may have one more
    than others (`train.invariant`).

    Attributes:
        world: Number of processes.
        micro_batch: Windows that one process computes at a time.
        contiguous: Whether each rank has consecutive micro-batches.
    """

    world: int
    micro_batch: int
    contiguous: bool = False

    def micro_steps(self, count: int) -> int:
        """Number of micro-steps of a batch of ``count`` windows, on the rank that has the most."""
        return -(-count // (self.world * self.micro_batch))

    def micro_batches(self, count: int, rank: int) -> range:
        """Micro-batches of a rank among all of a batch of ``count`` windows."""
        n = count // self.micro_batch
        if self.contiguous:
            return range(n * rank // self.world, n * (rank + 1) // self.world)
        return range(rank, n, self.world)

    def share(self, windows: np.ndarray, rank: int) -> np.ndarray:
        """One rank's share of a batch: (count,) -> (micro-batches of the rank, micro_batch)."""
        own = self.micro_batches(len(windows), rank)
        return windows.reshape(-1, self.micro_batch)[own.start : own.stop : own.step]

    @classmethod
    def of_leaves(cls, batch: int, leaf: int, world: int, name: str) -> Split:
        """Split a batch, and with it any multiple of it, into leaves of `train.invariant`.

        Args:
            batch: Windows in the smallest global batch.
            leaf: Windows of a leaf.
            world: Number of processes.
            name: Parameter of the batch, for the error message.

        Raises:
            UserError: A leaf does not divide the batch, or a process would have none.
        """
        if batch % leaf:
            raise UserError(
                f"params.yaml: train.invariant: {leaf} does not divide the {batch} sequences of "
                f"{name}; set {_nearest_divisors(batch, leaf)}"
            )
        if batch // leaf < world:
            fewer = [n for n in divisors(batch) if batch // n >= world]
            raise UserError(
                f"params.yaml: train.invariant: {name} has {batch // leaf} leaves of {leaf} "
                f"sequences, too few for {world} processes; set "
                + (f"{fewer[-1]}, or set " if fewer else "")
                + f"processes (machine.yaml, GPT2_PROCESSES) to {batch // leaf} or less"
            )
        return cls(world=world, micro_batch=leaf, contiguous=True)

    @classmethod
    def plan(
        cls,
        batch: int,
        block_size: int,
        world: int,
        micro_batch: int | None,
        largest: int,
        name: str = "train.batch_tokens",
    ) -> Split:
        """Split a batch, and with it any multiple of it.

        Args:
            batch: Windows in the global batch.
            world: Number of processes.
            micro_batch: Windows at a time, or None: the largest divisor up to ``largest``.
            largest: Most windows at a time where ``micro_batch`` is None.
            name: Parameter of the batch, for the error message.

        Raises:
            UserError: There is no even split; the message has the nearest values that split.
        """
        if batch % world:
            raise UserError(
                f"{name}: {batch * block_size} is {batch} sequences, which {world} processes "
                f"cannot share evenly; set {_nearest_multiples(batch, world, block_size)}, or set "
                f"processes (machine.yaml, GPT2_PROCESSES) to {_nearest_divisors(batch, world)}"
            )
        per_process = batch // world
        if micro_batch is None:
            micro_batch = max(n for n in divisors(per_process) if n <= max(1, largest))
        elif per_process % micro_batch:
            raise UserError(
                f"micro_batch (machine.yaml, GPT2_MICRO_BATCH): {micro_batch} does not divide the "
                f"{per_process} sequences per process and step; set "
                f"{_nearest_divisors(per_process, micro_batch)}"
            )
        return cls(world=world, micro_batch=micro_batch)


def share_batch(
    model: ModelParams, params: TrainParams, world_size: int, micro_batch: int | None, device: str
) -> Split:
    """Split the batch of some parameters among processes; for other arguments see ``Split.plan``.

    Args:
        device: "cpu" or "cuda", for which a ``micro_batch`` of None is chosen.

    Raises:
        UserError: There is no even split.
    """
    batches, name = params.batches(model.block_size), "train.batch_tokens"
    if params.batch_doublings:
        name += f" / 2^{params.batch_doublings} (batch_doublings)"
    if params.invariant:
        _check_invariant(params, params.invariant, micro_batch, device)
        return Split.of_leaves(batches.smallest, params.invariant, world_size, name)
    flops = flops_per_token(model.config(), model.block_size)
    tokens = min(MICRO_BATCH_TOKENS[device], MICRO_BATCH_FLOPS[device] / flops)
    return Split.plan(
        batches.smallest,
        model.block_size,
        world_size,
        micro_batch,
        int(tokens // model.block_size),
        name,
    )


def _check_invariant(params: TrainParams, leaf: int, micro_batch: int | None, device: str) -> None:
    """Refuse what `train.invariant` cannot be combined with.

    Raises:
        UserError: Names the key.
    """
    if micro_batch not in (None, leaf):
        raise UserError(
            f"micro_batch (machine.yaml, GPT2_MICRO_BATCH): {micro_batch}, but train.invariant "
            f"{leaf} computes {leaf} sequences at a time; remove micro_batch"
        )
    if params.dtype == "float16":
        raise UserError(
            "params.yaml: train.dtype: float16 scales the loss, which train.invariant does not; "
            "set bfloat16 or float32, or invariant: null"
        )
    if device == "cuda" and not params.deterministic:
        raise UserError(
            "params.yaml: train.invariant: on CUDA it needs algorithms that repeat; set "
            "train.deterministic: true"
        )


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, in order."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _nearest_divisors(n: int, wanted: int) -> str:
    nearest = sorted(divisors(n), key=lambda d: abs(d - wanted))[:2]
    return " or ".join(str(d) for d in sorted(nearest))


def _nearest_multiples(batch: int, world: int, block_size: int) -> str:
    below = batch // world * world
    return " or ".join(str(n * block_size) for n in (below, below + world) if n)
