"""Health of a run: steps whose loss or gradient is non-finite, and loss spikes.

Loss and gradient norm are reduced over the ranks, so all ranks come to the same result.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, pstdev

WINDOW = 128  # losses that a new one is compared with
MIN_LOSSES = 32  # needed for a comparison
SPIKE_SIGMAS, SPIKE_NATS = 6.0, 0.1  # a spike is above the mean by both
MAX_SKIPPED_IN_A_ROW = 10  # more are no fault of the data


class NonFinite(RuntimeError):
    """A loss or gradient is non-finite (NaN or Inf); the message names the step."""


@dataclass(frozen=True)
class Anomaly:
    """A skipped step or a loss spike, for the log.

    Attributes:
        name: "skipped" or "spike".
        value: Number of steps skipped so far, or the loss in nats.
        text: Line to print.
    """

    name: str
    value: float
    text: str


class Health:
    """Checks the loss and gradient norm of each step, in order.

    Args:
        skips: Whether non-finite steps are skipped (`train.non_finite`).
        skips_overflows: Whether those with a finite loss are: the loss is scaled (`train.dtype`
            float16), and a scale that is too large is halved.
        skipped: Number of steps that the run skipped before this start.
    """

    def __init__(self, *, skips: bool, skips_overflows: bool = False, skipped: int = 0) -> None:
        self._skips, self._skips_overflows, self._skipped = skips, skips_overflows, skipped
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, step: int, loss: float, norm: float) -> Anomaly | None:
        """Check one step.

        Args:
            step: Number of complete steps, this one included.
            loss: Mean loss over the step's tokens, nats.
            norm: Norm of the gradient before clipping.

        Raises:
            NonFinite: The run must stop.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            problem = f"loss {loss}, gradient norm {norm}: non-finite (NaN or Inf)"
            if overflows := self._skips_overflows and math.isfinite(loss):
                problem += ", an overflow of float16; the loss scale is halved"
            return self._non_finite(step, problem, self._skips or overflows)
        self._in_a_row = 0
        anomaly = None
        if len(self._losses) >= MIN_LOSSES:
            mean = fmean(self._losses)
            if loss > mean + max(SPIKE_NATS, SPIKE_SIGMAS * pstdev(self._losses, mean)):
                text = (
                    f"loss spike: {loss:.4f}, mean of the {len(self._losses)} steps before "
                    f"{mean:.4f}; {_how_to_trace(step)}"
                )
                anomaly = Anomaly("spike", loss, text)
        self._losses.append(loss)
        return anomaly

    def _non_finite(self, step: int, problem: str, skips: bool) -> Anomaly:
        self._skipped += 1
        self._in_a_row += 1
        if skips and self._in_a_row < MAX_SKIPPED_IN_A_ROW:
            return Anomaly("skipped", self._skipped, f"skipped: {problem}; {_how_to_trace(step)}")
        if skips:
            problem += f", {MAX_SKIPPED_IN_A_ROW} steps in a row"
        raise NonFinite(f"step {step}: {problem}; {_how_to_trace(step)}")


def _how_to_trace(step: int) -> str:
    return f"see its documents with python -m train.trace --step {step}"
