"""The learning rate and the batch of each step, as pure functions of its number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    r"""Learning rate of each optimizer step, steps counted from 0.

        peak        __________ constant
               /|‾‾‾‾‾‾\______ stable, then linear decay   ("wsd")
              / |  ‾‾--..
             /  |        ‾‾-- cosine ("cosine")
        min /   |            |
           0   warmup    steps - 1

    Step 0 is never zero (a step of no length wastes a batch), step ``warmup_steps`` is the first
    after the warm-up and at the peak, and step ``steps - 1``, the last, is at the minimum exactly.
    Sources: cosine, Loshchilov and Hutter 2017 (without restarts); warm-up-stable-decay, Hu et
    al. 2024 (MiniCPM), with the linear decay of Hägele et al. 2024.

    Attributes:
        kind: "cosine", "wsd" or "constant".
        peak: Highest learning rate.
        minimum: Learning rate of the last step ("constant" has none).
        steps: Optimizer steps in the run.
        warmup_steps: Steps of linear rise, in [0, steps).
        decay_steps: "wsd" only: steps over which the rate falls at the end.
    """

    kind: Literal["cosine", "wsd", "constant"]
    peak: float
    minimum: float
    steps: int
    warmup_steps: int
    decay_steps: int = 0

    def __call__(self, step: int) -> float:
        """Learning rate of step ``step``, 0 <= step < steps."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside the run's {self.steps} steps")
        if step < self.warmup_steps:
            return self.peak * ((step + 1) / self.warmup_steps)
        height = self._height(step)
        return self.minimum * (1.0 - height) + self.peak * height  # exact at both ends

    def _height(self, step: int) -> float:
        """Part of the way from the minimum (0) to the peak (1), after the warm-up."""
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
    """Which global samples each step takes: ``[start, start + count)``, steps counted from 0.

    A batch may grow to its full size by doublings, as many steps with each of the smaller sizes
    (with 2 doublings in 100 steps: 50 of a quarter, 50 of a half, then the whole). Early gradients
    agree so well that a small batch wastes none of them (McCandlish et al. 2018); GPT-3 grew its
    batch so. Every size is the smallest times a power of two, so what shares the smallest among
    processes and micro-steps shares them all.

    Attributes:
        full: Samples of a step once the batch is whole.
        doublings: How often it doubles until then; 0: it is whole from the first step on.
        ramp_steps: Steps before it is whole.
    """

    full: int
    doublings: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        if self.full % 2**self.doublings:
            raise ValueError(f"{self.full} samples cannot be halved {self.doublings} times")

    @property
    def smallest(self) -> int:
        """Samples of the first step."""
        return self.full >> self.doublings

    def __call__(self, step: int) -> tuple[int, int]:
        """First sample and number of samples of step ``step``, 0 <= step; O(doublings)."""
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
