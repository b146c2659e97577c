"""How a global batch is shared by processes and micro-steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.size import flops_per_token
from pipeline.runtime.errors import UserError
from train.params import ModelParams, TrainParams

# Tokens of a micro-batch where the machine's settings name none: enough to fill the processor, and
# little enough for any memory.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

# A step is interrupted only between micro-batches: on a CPU they must not take long, some seconds
# of one core. A GPT-2 of 124M has one sequence of 1,024 at a time.
MICRO_BATCH_FLOPS = {"cpu": 5e11, "cuda": math.inf}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who computes which samples of a global batch.

        sample of (micro-step m, rank r, row b) = start + (m * world + r) * micro_batch + b

    Attributes:
        world: Processes.
        micro_batch: Windows that one process computes at a time.
    """

    world: int
    micro_batch: int

    def micro_steps(self, count: int) -> int:
        """Micro-steps of a batch of ``count`` windows, the same on each rank."""
        return count // (self.world * self.micro_batch)

    def share(self, windows: np.ndarray, rank: int) -> np.ndarray:
        """What one rank computes of a batch: (count,) -> (micro_steps, micro_batch)."""
        return windows.reshape(-1, self.world, self.micro_batch)[:, rank]

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
        """Splits a batch, and any multiple of it.

        Args:
            batch: Windows in the global batch.
            block_size: Tokens a window.
            world: Processes.
            micro_batch: Windows at a time, or None: the largest divisor up to ``largest``.
            largest: What fits without being asked for.
            name: Of the batch, for the message.

        Raises:
            UserError: No even split; names the nearest that are.
        """
        if batch % world:
            raise UserError(
                f"{name}: {batch * block_size} are {batch} sequences, which {world} "
                f"processes cannot share; nearest: {_around(batch, world, block_size)}, or set "
                f"processes (machine.yaml, GPT2_PROCESSES) to {_near_divisors(batch, world)}"
            )
        each = batch // world
        if micro_batch is None:
            micro_batch = max(n for n in divisors(each) if n <= max(1, largest))
        elif each % micro_batch:
            raise UserError(
                f"micro_batch (machine.yaml, GPT2_MICRO_BATCH): {micro_batch} does not divide the "
                f"{each} sequences that each of {world} processes has a step; nearest: "
                f"{_near_divisors(each, micro_batch)}"
            )
        return cls(world=world, micro_batch=micro_batch)


def divisors(n: int) -> list[int]:
    """All divisors, in order."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _near_divisors(n: int, wanted: int) -> str:
    nearest = sorted(divisors(n), key=lambda d: abs(d - wanted))[:2]
    return " or ".join(str(d) for d in sorted(nearest))


def _around(batch: int, world: int, block_size: int) -> str:
    below = batch // world * world
    return " or ".join(str(n * block_size) for n in (below, below + world) if n)


def share_batch(
    model: ModelParams, params: TrainParams, world_size: int, micro_batch: int | None, device: str
) -> Split:
    """How parameters' batch is shared by any processes; micro-batches of None are chosen.

    Raises:
        UserError: It cannot be shared evenly.
    """
    flops = flops_per_token(model.config(), model.block_size)
    tokens = min(MICRO_BATCH_TOKENS[device], MICRO_BATCH_FLOPS[device] / flops)
    doublings = params.batch_doublings
    return Split.plan(
        params.batches(model.block_size).smallest,
        model.block_size,
        world_size,
        micro_batch,
        int(tokens // model.block_size),
        "train.batch_tokens" + (f" / 2^{doublings} (batch_doublings)" if doublings else ""),
    )
