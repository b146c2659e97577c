"""Learning rate and batch of each step, as pure functions of the step number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate of each optimizer step, counted from 0.

        warm-up     linear, from peak / warmup_steps at step 0 (not 0, which would waste a batch)
        "cosine"    half a cosine, from peak to minimum (Loshchilov and Hutter 2017, no restarts)
        "wsd"       peak, then linear decay to minimum in the last decay_steps
                    (warm-up-stable-decay: Hu et al. 2024, MiniCPM; linear: Hägele et al. 2024)
        "constant"  peak

    Step ``warmup_steps`` has the peak exactly, and the last step the minimum.

    Attributes:
        kind: "cosine", "wsd" or "constant".
        peak: Highest learning rate.
        minimum: Learning rate of the last step ("constant" ignores it).
        steps: Optimizer steps in the run.
        warmup_steps: Steps of linear warm-up, in [0, steps).
        decay_steps: Steps of linear decay at the end ("wsd" only).
    """

    kind: Literal["cosine", "wsd", "constant"]
    peak: float
    minimum: float
    steps: int
    warmup_steps: int
    decay_steps: int = 0

    def __call__(self, step: int) -> float:
        """Return the learning rate of step ``step``, 0 <= step < steps."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside the run's {self.steps} steps")
        if step < self.warmup_steps:
            return self.peak * ((step + 1) / self.warmup_steps)
        height = self._height(step)
        return self.minimum * (1.0 - height) + self.peak * height  # exact at both ends

    def _height(self, step: int) -> float:
        """Height between minimum (0) and peak (1), after the warm-up."""
        last = self.steps - 1
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            return min(1.0, (last - step) / max(1, self.decay_steps))
        if step == last:
            return 0.0
        return 0.5 * (
            1.0 + math.cos(math.pi * (step - self.warmup_steps) / (last - self.warmup_steps))
        )


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Global samples of each step: ``[start, start + count)``, steps counted from 0.

    The batch may double until it has its full size, with equally many steps at each smaller size (2
    doublings in 100 steps: 50 steps of a quarter, 50 of a half, then full). Early gradients have so
    little noise that a small batch suffices (McCandlish et al. 2018); GPT-3 ramped its batch up,
    too. Every size is the smallest times a power of two, so a split of the smallest among processes
    and micro-steps splits them all.

    Attributes:
        full: Samples per step at full size.
        doublings: Number of doublings up to the full size; 0: full from the first step.
        ramp_steps: Steps below the full size.
    """

    full: int
    doublings: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        if self.full % 2**self.doublings:
            raise ValueError(f"{self.full} samples cannot be halved {self.doublings} times")

    @property
    def smallest(self) -> int:
        """Number of samples of the first step."""
        return self.full >> self.doublings

    def spans(self, first: int, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (step, first sample, number of samples) for steps [first, stop)."""
        for step in itertools.count(first) if stop is None else range(first, stop):
            yield (step, *self(step))

    def __call__(self, step: int) -> tuple[int, int]:
        """Return first sample and number of samples of step ``step`` >= 0, in O(doublings)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        start = begin = 0
        for size in range(self.doublings):
            end = (size + 1) * self.ramp_steps // self.doublings
            count = self.smallest << size
            if step < end:
                return start + (step - begin) * count, count
            start, begin = start + (end - begin) * count, end
        return start + (step - begin) * self.full, self.full
