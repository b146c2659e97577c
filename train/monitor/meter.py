"""What a step measured: read one step late, checked, logged, and shown.

Reading a number from a GPU waits for all that is queued before it. So the numbers of step n are
copied to the host when the step is queued, and looked at when step n + 1 has been queued.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from train.distributed.world import World
from train.monitor.health import Health, NonFinite
from train.monitor.history import History, Record
from train.numerics import peak_memory


@dataclass(frozen=True)
class _Pending:
    """Numbers on their way to the host."""

    step: int
    learning_rate: float
    seconds: float
    waited: float
    values: Tensor
    arrived: torch.cuda.Event | None


class Meter:
    """Collects the numbers of steps; on rank 0 also logs and prints them.

    Each rank sees the same reduced numbers, so each stops at the same step.

    Args:
        world: The processes.
        history: Where rank 0 logs.
        steps: Steps of the run.
        tokens: Tokens that so many complete steps have trained on.
        every: Steps between logged ones.
        seconds: Time that the run has spent training before this start.
        flops_per_token: Operations that the model needs for a token, forward and backward.
        peak: Operations a second that all devices could do; None: not known, so no MFU.
        health: Looks at each step's numbers.
    """

    def __init__(
        self,
        world: World,
        history: History,
        *,
        steps: int,
        tokens: Callable[[int], int],
        every: int,
        seconds: float,
        flops_per_token: int,
        peak: float | None,
        health: Health,
    ) -> None:
        self._world, self._history, self._health = world, history, health
        self._steps, self._tokens, self._every = steps, tokens, every
        self._flops_per_token, self._peak = flops_per_token, peak
        self.seconds = seconds
        self._pending: _Pending | None = None
        self._mark = time.perf_counter()
        # (step, seconds, seconds waited for data) at the last line
        self._logged: tuple[int, float, float] | None = None

    def step(self, step: int, learning_rate: float, values: Tensor, waited: float) -> None:
        """Takes the numbers of a step, and deals with those of the step before.

        Args:
            step: Complete steps, this one included.
            learning_rate: Of this step.
            values: (2,) on the device: loss and gradient norm, both already reduced.
            waited: Seconds that this start has waited for data so far.

        Raises:
            NonFinite: The step before went wrong.
        """
        if self._logged is None:  # speed is measured from this start's first step on
            self._logged = (step - 1, self.seconds, 0.0)
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        before, self._pending = self._pending, self._send(step, learning_rate, values, waited)
        if before is not None:
            self._read(before)

    def settle(self) -> None:
        """Deals with the newest step at once, before its weights are saved or measured.

        The log is on the disk then, too: a checkpoint never knows of steps that it does not.

        Raises:
            NonFinite: It went wrong.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)
            now = time.perf_counter()
            self.seconds += now - self._mark  # a GPU was still computing that step
            self._mark = now
        self._history.sync()

    def resume_clock(self) -> None:
        """Leaves the time since the last step (a validation, a save) out of the training time."""
        self._mark = time.perf_counter()

    def validation(self, step: int, loss: float, hellaswag: float | None = None) -> None:
        """Logs and shows a validation.

        Args:
            step: Complete steps.
            loss: Over the validation tokens.
            hellaswag: Part of its tasks answered right; None: not asked at this step.

        Raises:
            NonFinite: The weights that were measured are no good.
        """
        if not math.isfinite(loss):
            raise NonFinite(f"step {step}: validation loss {loss}: not finite")
        if self._world.first:
            best = min([loss, *self._history.last("val/loss", n=self._steps)])
            record = {"step": step, "val/loss": loss}
            mark = "  best" if loss <= best else f"  best {best:.4f}"
            if hellaswag is not None:
                record["val/hellaswag"] = hellaswag
                mark += f"  hellaswag {hellaswag:.4f}"
            self._history.add(record)
            self._print(step, f"val loss {loss:.4f}{mark}")

    def sample(self, step: int, tokens: list[int]) -> None:
        """Logs a sample, for the report; none where there is none."""
        if tokens:
            self._history.add({"step": step, "sample": tokens})

    def note(self, step: int, text: str) -> None:
        """Shows a line, on rank 0."""
        if self._world.first:
            self._print(step, text)

    def _send(self, step: int, learning_rate: float, values: Tensor, waited: float) -> _Pending:
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            values = host
        return _Pending(step, learning_rate, self.seconds, waited, values, arrived)

    def _read(self, pending: _Pending) -> None:
        if pending.arrived is not None:
            self._world.wait(pending.arrived)
        loss, norm = pending.values.tolist()
        step = pending.step
        mark = self._health.look(step, loss, norm)
        if mark is not None and self._world.first:
            self._history.add({"step": step, mark.name: mark.value})
            self._print(step, mark.text)
        if mark is not None and mark.name == "skipped":
            return
        if step % self._every and step not in (1, self._steps):
            return
        assert self._logged is not None
        before, at, waited = self._logged
        self._logged = (step, pending.seconds, pending.waited)
        if not self._world.first:
            return
        elapsed = max(pending.seconds - at, 1e-9)
        speed = (self._tokens(step) - self._tokens(before)) / elapsed
        record = {
            "step": step,
            "tokens": self._tokens(step),
            "train/loss": loss,
            "lr": pending.learning_rate,
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
            "step_seconds": round(elapsed / (step - before), 4),
            "data_wait": round((pending.waited - waited) / elapsed, 5),  # part of the time
            "memory_gb": round(peak_memory(self._world.device) / 1e9, 3),
            "seconds": round(pending.seconds, 3),
        }
        if self._peak is not None:
            record["mfu"] = round(speed * self._flops_per_token / self._peak, 4)
        self._history.add(record)
        left = (self._tokens(self._steps) - self._tokens(step)) / speed
        self._print(step, f"{_line(record)}  eta {timedelta(seconds=round(left))}")

    def _print(self, step: int, text: str) -> None:
        width = len(str(self._steps))
        try:
            print(f"step {step:{width}d}/{self._steps}  {text}", flush=True)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Ctrl-C ends the `tee` that reads as well, or the terminal is gone: the run is saved
            # all the same, its log has the line, and what Python holds must not fail at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line(record: Record) -> str:
    mfu = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
    return (
        f"loss {record['train/loss']:7.4f}  lr {record['lr']:.2e}"
        f"  norm {record['grad_norm']:7.3f}  {record['tokens_per_second']:11,.0f} tok/s{mfu}"
        f"  {record['step_seconds']:.3f} s/step  data wait {record['data_wait']:.1%}"
        f"  {record['memory_gb']:.2f} GB"
    )
