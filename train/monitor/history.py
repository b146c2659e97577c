"""Log of a run: one JSON record per line, and the curves that DVC draws from it.

`log.jsonl` in the run's folder is the original. DVC deletes the curves before it runs a stage, so
each start writes them again from the log. Each line ends with a checksum of its record; a damaged
line is named and skipped, and costs its points of the curves.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from pipeline.format.manifest import SOURCE_NAME
from pipeline.store import atomic
from train.monitor.loggers import Loggers

CURVES = (
    "train/loss",
    "val/loss",
    "val/hellaswag",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_wait",
    "memory_gb",
)

SOURCE_LOSS = "val/source/"
"""Before the name of a source: its validation loss, where there are several."""

CHECKSUM = "crc32"

SAMPLE_PROMPT = 16
"""Tokens at the start of a sample that are its prompt: those of the validation split."""

Record = dict[str, Any]


class History:
    """Log (`log.jsonl`) and curves (a folder of DVCLive) of one run; only rank 0 writes them.

    Args:
        path: The log.
        curves: The folder of the curves.
        every: Steps per logged step.
        loggers: Other programs that draw the log.
    """

    def __init__(
        self, path: Path, curves: Path, every: int = 1, loggers: Loggers | None = None
    ) -> None:
        self.path, self._every = path, every
        self._loggers = loggers or Loggers([], path.parent)
        self.records = parse(path.read_bytes(), str(path)) if path.is_file() else []
        self._curves = curves
        self._file: TextIO | None = None
        self._live: Any = None

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, step: int) -> None:
        """Truncate the log after ``step`` complete steps, write its curves, and open both.

        A resumed run logs again what a killed one logged after its last checkpoint.
        """
        self.records = [record for record in self.records if record["step"] <= step]
        self._warn_if_cut(step)
        if self.path.exists() and not self.path.is_file():
            _warn(f"{self.path}: not a regular file; replaced")
            atomic.remove(self.path)
        atomic.write_bytes(self.path, self.content())
        self._open_curves()
        self._loggers.begin(self.records)
        self._file = open(self.path, "a", encoding="utf-8")

    def draw(self, step: int) -> None:
        """Write the curves of a finished run of so many steps."""
        self._warn_if_cut(step)
        self._open_curves()
        self.end()

    def content(self) -> bytes:
        """Return the content of a log of these records."""
        return "".join(_line(record) for record in self.records).encode()

    def _warn_if_cut(self, step: int) -> None:
        """Report a log that ends long before the step that its run has reached."""
        steps = [record["step"] for record in self.records] or [0]
        gap = max([self._every, *(b - a for a, b in pairwise(steps))])
        if self.path.exists() and steps[-1] + gap < step:
            _warn(
                f"{self.path}: ends at step {steps[-1]}, but the run has reached step {step}; "
                "the curves lack the points between"
            )

    def add(self, record: Record) -> None:
        """Log a record: "step", the number of complete steps, and measurements."""
        assert self._file is not None, "begin() first"
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        self._draw(record)
        self._live.make_summary()
        self._loggers.add(record)

    def sync(self) -> None:
        """Sync the log to disk, before a checkpoint of the same step is saved."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def end(self) -> None:
        """Close log and curves."""
        if self._live is not None:
            self._live.end()
        self._loggers.end()
        if self._file is not None:
            self._file.close()
        self._file = self._live = None

    def validations(self, val_tokens: int) -> list[float]:
        """Validation losses over so many tokens, oldest first."""
        return [
            record["val/loss"]
            for record in self.records
            if record.get("val_tokens", val_tokens) == val_tokens and "val/loss" in record
        ]

    def last(self, name: str, n: int = 1) -> list[Any]:
        """Return the newest ``n`` values of a curve, or fewer, oldest first."""
        return [record[name] for record in self.records if name in record][-n:]

    def _open_curves(self) -> None:
        from dvclive.live import Live  # here: an import of half a second, on rank 0 only

        if self._curves.exists():  # DVCLive would append to what it cannot remove
            shutil.rmtree(self._curves)
        self._live = Live(dir=str(self._curves), save_dvc_exp=False, dvcyaml=None)
        for record in self.records:
            self._draw(record)
        self._live.make_summary()

    def _draw(self, record: Record) -> None:
        self._live.step = record["step"]
        for name, value in record.items():
            source = name.removeprefix(SOURCE_LOSS)
            if name in CURVES or (source != name and SOURCE_NAME.fullmatch(source)):
                self._live.log_metric(name, value)


def parse(data: bytes, name: str = "") -> list[Record]:
    """Read the records of a log, oldest first.

    Damaged lines are skipped, and reported on stderr. A crash may have cut the last one. Logs of
    earlier versions have no checksums.

    Args:
        data: The content of the log.
        name: Its name, for the warning; empty: none, for a log that is still written.
    """
    lines = {number: _record(line) for number, line in enumerate(data.splitlines(), 1)}
    damaged = [number for number, record in lines.items() if record is None]
    if damaged and name:
        shown = ", ".join(map(str, damaged[:10])) + ", ..." * (len(damaged) > 10)
        _warn(f"{name}: damaged and skipped: line {shown}; the curves lack their points")
    return [record for record in lines.values() if record is not None]


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _record(line: bytes) -> Record | None:
    """Return the record of a line; None if the line is damaged."""
    try:
        record = atomic.parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    found = record.pop(CHECKSUM, None)
    is_intact = found in (None, _checksum(record))
    return record if is_intact and all(_is_value(*entry) for entry in record.items()) else None


def _is_value(name: str, value: object) -> bool:
    """Return whether a log has such a value: a number of 64 bits, or the tokens of a sample."""
    if name == "sample":
        return isinstance(value, list) and all(type(token) is int for token in value)
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _checksum(record: Record) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _line(record: Record) -> str:
    return json.dumps({**record, CHECKSUM: _checksum(record)}, sort_keys=True) + "\n"
