"""Log of a run: one JSON record per line, and the curves that DVC draws from it.

`log.jsonl` in the run's folder is the original. DVC deletes the curves before it runs a stage, so
each start writes them again from the log.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from pipeline.store import atomic

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

Record = dict[str, Any]


class History:
    """Log (`log.jsonl`) and curves (a folder of DVCLive) of one run; only rank 0 writes them."""

    def __init__(self, path: Path, curves: Path) -> None:
        self.path = path
        self.records = _read(path)
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
        lines = "".join(_line(record) for record in self.records)
        atomic.write_bytes(self.path, lines.encode())
        self._open_curves()
        self._file = open(self.path, "a", encoding="utf-8")

    def draw(self) -> None:
        """Write the curves of a finished run."""
        self._open_curves()
        self.end()

    def add(self, record: Record) -> None:
        """Log a record: "step", the number of complete steps, and measurements."""
        assert self._file is not None, "begin() first"
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        self._draw(record)
        self._live.make_summary()

    def sync(self) -> None:
        """Sync the log to disk, before a checkpoint of the same step is saved."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def end(self) -> None:
        """Close log and curves."""
        if self._live is not None:
            self._live.end()
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

        self._live = Live(dir=str(self._curves), save_dvc_exp=False, dvcyaml=None)
        for record in self.records:
            self._draw(record)
        self._live.make_summary()

    def _draw(self, record: Record) -> None:
        self._live.step = record["step"]
        for name in CURVES:
            if name in record:
                self._live.log_metric(name, record[name])


def _line(record: Record) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def _read(path: Path) -> list[Record]:
    """Read the complete lines of a log; a crash may have cut the last one."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
