"""What a step's loss and gradient say of the run's health: not finite, or a spike.

Both numbers are reduced, so that each rank comes to the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, pstdev

WINDOW = 128  # losses that a new one is compared with
ENOUGH = 32  # fewer say nothing
SIGMAS, NATS = 6.0, 0.1  # a spike is so far above their mean, by both measures
MOST_SKIPPED = 10  # in a row: then it is not the data


class NonFinite(RuntimeError):
    """A loss or a gradient that is no number; the message names the step."""


@dataclass(frozen=True)
class Mark:
    """Something that is logged and shown at a step."""

    name: str
    value: float
    text: str


class Health:
    """Looks at each step's numbers, in order.

    Args:
        skips: Whether a step that is not finite is skipped (`train.non_finite`).
        skipped: Steps that the run has skipped before this start.
    """

    def __init__(self, *, skips: bool, skipped: int = 0) -> None:
        self._skips, self._skipped = skips, skipped
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, loss: float, norm: float) -> Mark | None:
        """What there is to say of a step.

        Args:
            step: Complete steps, this one included.
            loss: Mean over its tokens, nats.
            norm: Of its gradient, before clipping.

        Returns:
            "skipped", the number of steps so far whose update was left out; "spike", the loss; or
            None.

        Raises:
            NonFinite: The run must not go on.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._not_finite(step, f"loss {loss}, gradient norm {norm}: not finite")
        self._in_a_row = 0
        mark = None
        if len(self._losses) >= ENOUGH:
            mean = fmean(self._losses)
            if loss > mean + max(NATS, SIGMAS * pstdev(self._losses, mean)):
                text = (
                    f"loss spike: {loss:.4f}, where the {len(self._losses)} before average "
                    f"{mean:.4f}; {trace(step)}"
                )
                mark = Mark("spike", loss, text)
        self._losses.append(loss)
        return mark

    def _not_finite(self, step: int, what: str) -> Mark:
        self._skipped += 1
        self._in_a_row += 1
        if not self._skips:
            raise NonFinite(f"step {step}: {what}; {trace(step)}")
        if self._in_a_row == MOST_SKIPPED:
            raise NonFinite(f"step {step}: {what}, {MOST_SKIPPED} times in a row; {trace(step)}")
        return Mark("skipped", self._skipped, f"skipped: {what}; {trace(step)}")


def trace(step: int) -> str:
    """How to see the documents of a step."""
    return f"its documents: python -m train.trace --step {step}"
