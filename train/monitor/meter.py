"""The numbers of each step: read one step late, checked, logged and printed.

Reading a number from a GPU waits for all work queued before it. So the numbers of step n are copied
to the host when the step is queued, and read when step n + 1 has been queued.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from train.distributed.world import World
from train.monitor.health import Health, NonFinite
from train.monitor.history import SOURCE_LOSS, History, Record
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
    """Collects the numbers of steps; on rank 0 it also logs and prints them.

    All ranks see the same reduced numbers, so a non-finite one stops them at the same step.

    Args:
        tokens: Maps a number of complete steps to the number of tokens they train on.
        every: Steps per logged step.
        val_tokens: Tokens per validation; losses over other tokens are not compared.
        seconds: Training time of the run before this start.
        flops_per_token: FLOPs of the model per token, forward and backward.
        peak: Peak FLOP/s of all devices together; None: unknown, so there is no MFU.
    """

    def __init__(
        self,
        world: World,
        history: History,
        *,
        steps: int,
        tokens: Callable[[int], int],
        every: int,
        val_tokens: int,
        seconds: float,
        flops_per_token: int,
        peak: float | None,
        health: Health,
    ) -> None:
        self._world, self._history, self._health = world, history, health
        self._steps, self._tokens, self._every = steps, tokens, every
        self._val_tokens = val_tokens
        self._flops_per_token, self._peak = flops_per_token, peak
        self.seconds = seconds
        self._pending: _Pending | None = None
        self._clock = time.perf_counter()
        # (step, seconds, seconds waited for data) of the last logged step
        self._logged: tuple[int, float, float] | None = None

    def step(self, step: int, learning_rate: float, values: Tensor, waited: float) -> None:
        """Take the numbers of a step, and log those of the step before.

        Args:
            step: Number of complete steps, this one included.
            learning_rate: Learning rate of this step.
            values: (2,) on the device: loss and gradient norm, reduced over the ranks.
            waited: Seconds spent waiting for data since this start.

        Raises:
            NonFinite: The step before has a non-finite loss or gradient.
        """
        if self._logged is None:  # speed is measured from this start's first step on
            self._logged = (step - 1, self.seconds, 0.0)
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        before, self._pending = self._pending, self._to_host(step, learning_rate, values, waited)
        if before is not None:
            self._read(before)

    def flush(self) -> None:
        """Log the newest step at once, before its weights are saved or validated.

        The log is synced to disk: it is never behind a checkpoint.

        Raises:
            NonFinite: The step has a non-finite loss or gradient.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)
            now = time.perf_counter()
            self.seconds += now - self._clock  # a GPU was still computing that step
            self._clock = now
        self._history.sync()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (a validation, a save) from the training time."""
        self._clock = time.perf_counter()

    def log_validation(
        self,
        step: int,
        loss: float,
        hellaswag: float | None = None,
        of_sources: Mapping[str, float] | None = None,
    ) -> None:
        """Log and print a validation.

        Args:
            loss: Mean loss over the validation tokens, nats.
            hellaswag: Fraction of HellaSwag tasks answered correctly; None: not scored.
            of_sources: Loss over the validation tokens of each source, if there are several.

        Raises:
            NonFinite: The loss is non-finite.
        """
        if not math.isfinite(loss):
            raise NonFinite(f"step {step}: validation loss {loss}: non-finite (NaN or Inf)")
        if self._world.first:
            best = min([loss, *self._history.validations(self._val_tokens)])
            record: Record = {"step": step, "val/loss": loss, "val_tokens": self._val_tokens}
            notes = "  best" if loss <= best else f"  best {best:.4f}"
            if hellaswag is not None:
                record["val/hellaswag"] = hellaswag
                notes += f"  hellaswag {hellaswag:.4f}"
            for name, value in (of_sources or {}).items():
                record[f"{SOURCE_LOSS}{name}"] = value
                notes += f"  {name} {value:.4f}"
            self._history.add(record)
            self.print_line(step, f"val loss {loss:.4f}{notes}")

    def log_sample(self, step: int, tokens: list[int]) -> None:
        """Log the tokens of a sample, for the report; nothing if there are none."""
        if tokens:
            self._history.add({"step": step, "sample": tokens})

    def print_line(self, step: int, text: str) -> None:
        """Print a line about a step, on rank 0."""
        if not self._world.first:
            return
        width = len(str(self._steps))
        try:
            print(f"step {step:{width}d}/{self._steps}  {text}", flush=True)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # The terminal is gone, or Ctrl-C has ended the `tee` that reads: the run must still be
            # saved, and Python's buffer must not fail at exit. The log has the numbers.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _to_host(self, step: int, learning_rate: float, values: Tensor, waited: float) -> _Pending:
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            values = host
        return _Pending(step, learning_rate, self.seconds, waited, values, arrived)

    def _read(self, pending: _Pending) -> None:
        """Check the numbers of a step and, on rank 0, log them if they are due."""
        if pending.arrived is not None:
            self._world.wait_for_gpu(pending.arrived)
        loss, norm = pending.values.tolist()
        step = pending.step
        anomaly = self._health.check(step, loss, norm)
        if not self._world.first:
            return
        if anomaly is not None:
            self._history.add({"step": step, anomaly.name: anomaly.value})
            self.print_line(step, anomaly.text)
        skipped = anomaly is not None and anomaly.name == "skipped"
        if not skipped and (step % self._every == 0 or step in (1, self._steps)):
            self._log(pending, loss, norm)

    def _log(self, pending: _Pending, loss: float, norm: float) -> None:
        assert self._logged is not None
        step, (last_step, last_seconds, last_waited) = pending.step, self._logged
        self._logged = (step, pending.seconds, pending.waited)
        elapsed = max(pending.seconds - last_seconds, 1e-9)
        speed = (self._tokens(step) - self._tokens(last_step)) / elapsed
        record = {
            "step": step,
            "tokens": self._tokens(step),
            "train/loss": loss,
            "lr": pending.learning_rate,
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
            "step_seconds": round(elapsed / (step - last_step), 4),
            "data_wait": round((pending.waited - last_waited) / elapsed, 5),  # fraction of the time
            "memory_gb": round(peak_memory(self._world.device) / 1e9, 3),
            "seconds": round(pending.seconds, 3),
        }
        if self._peak is not None:
            record["mfu"] = round(speed * self._flops_per_token / self._peak, 4)
        self._history.add(record)
        left = (self._tokens(self._steps) - self._tokens(step)) / speed
        self.print_line(step, f"{_line(record)}  eta {timedelta(seconds=round(left))}")


def _line(record: Record) -> str:
    mfu = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
    return (
        f"loss {record['train/loss']:7.4f}  lr {record['lr']:.2e}"
        f"  norm {record['grad_norm']:7.3f}  {record['tokens_per_second']:11,.0f} tok/s{mfu}"
        f"  {record['step_seconds']:.3f} s/step  data wait {record['data_wait']:.1%}"
        f"  {record['memory_gb']:.2f} GB"
    )
