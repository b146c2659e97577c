"""Other programs that draw the log of a run: TensorBoard, Weights & Biases, and trackio.

`loggers` in machine.yaml names them. Each start writes the whole log again, as for DVC's curves
(history.py), so a resumed run has neither gaps nor doubles. A logger that fails ends with a warning
and never stops the run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import LoggerName

PROJECT = "gpt2-pretraining"  # on the pages of Weights & Biases, and of trackio
FLUSH_SECONDS = 10


class Logger(Protocol):
    """A program that draws curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; steps never decrease."""

    def end(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = SummaryWriter(folder, flush_secs=FLUSH_SECONDS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise."""

    def __init__(self, run: Path) -> None:
        import wandb

        shutil.rmtree(run / "wandb", ignore_errors=True)
        self._run = wandb.init(
            project=PROJECT,
            id=run.name[:12],
            dir=run,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step, if a resumed run does not have them."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def end(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """A run in trackio's database on this machine, which `trackio show` draws.

    Written by `trackio.sqlite_storage`, as trackio's own imports are: `trackio.init` would send the
    token of the Hugging Face hub that is stored on the machine to the hub, to ask for its owner.
    """

    def __init__(self, run: Path) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._storage: Any = SQLiteStorage
        self._run = run.name[:12]
        self._storage.delete_run(PROJECT, self._run, run_id=self._run)
        if self._storage.get_log_count(PROJECT, self._run, run_id=self._run):
            raise OSError("the points of the last start cannot be deleted")
        self._points: list[tuple[int, Mapping[str, float]]] = []
        self._written = time.monotonic()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; written with others, as each write locks the database."""
        self._points.append((step, values))
        if time.monotonic() >= self._written + FLUSH_SECONDS:
            self.end()

    def end(self) -> None:
        """Write the points that are not written yet."""
        steps, values = [step for step, _ in self._points], [values for _, values in self._points]
        self._storage.bulk_log(PROJECT, self._run, values, steps, run_id=self._run)
        self._points, self._written = [], time.monotonic()


LOGGERS: dict[LoggerName, Callable[[Path], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_installed(names: Sequence[LoggerName]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        UserError: One is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"loggers: the package {name} is not installed; pip install {name}, or remove it "
                "from loggers (machine.yaml, GPT2_LOGGERS)"
            )


class Loggers:
    """The loggers of one run.

    Args:
        names: Those that are wanted.
        run: The run's folder.
    """

    def __init__(self, names: Sequence[LoggerName], run: Path) -> None:
        self._names, self._run = names, run
        self._open: dict[str, Logger] = {}

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Start the loggers, and write the log so far."""
        for name in self._names:
            self._try(name, partial(self._start, name))
        for record in records:
            self.add(record)

    def _start(self, name: LoggerName) -> None:
        self._open[name] = LOGGERS[name](self._run)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record of the log."""
        values = {n: v for n, v in record.items() if n != "step" and not isinstance(v, list)}
        for name, logger in [*self._open.items()]:
            self._try(name, partial(logger.log, record["step"], values))

    def end(self) -> None:
        """End the loggers."""
        for name, logger in [*self._open.items()]:
            self._try(name, logger.end)
        self._open = {}

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, the run goes on
            print(f"warning: logger {name} failed and is off: {error}", file=sys.stderr, flush=True)
            self._open.pop(name, None)
