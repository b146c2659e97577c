"""The history of a run: a line of JSON a logged step, and the curves that DVC shows of it.

`log.jsonl` in the run's folder is the truth. DVC deletes the curves before a stage runs, so they
are drawn anew from the log on each start, and then grow with it.
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
    """The log of one run; used on rank 0 only.

    Args:
        path: `log.jsonl`.
        curves: Folder of DVCLive.
    """

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
        """Cuts the log after ``step`` complete steps, draws its curves, and opens both to grow.

        What a killed run logged after its last checkpoint is logged again by the resumed one.
        """
        self.records = [record for record in self.records if record["step"] <= step]
        lines = "".join(_line(record) for record in self.records)
        atomic.write_bytes(self.path, lines.encode())
        self._open_curves()
        self._file = open(self.path, "a", encoding="utf-8")

    def draw(self) -> None:
        """Draws the curves of a finished run."""
        self._open_curves()
        self.end()

    def add(self, record: Record) -> None:
        """Logs a record: "step", the number of complete steps, and what was measured then."""
        assert self._file is not None, "begin() first"
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        self._draw(record)
        self._live.make_summary()

    def sync(self) -> None:
        """Makes the log durable; before a checkpoint that stands for it is."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def end(self) -> None:
        """Closes log and curves."""
        if self._live is not None:
            self._live.end()
        if self._file is not None:
            self._file.close()
        self._file = self._live = None

    def last(self, name: str, n: int = 1) -> list[Any]:
        """The newest ``n`` values of a curve, oldest first; fewer where there are fewer."""
        return [record[name] for record in self.records if name in record][-n:]

    def _open_curves(self) -> None:
        from dvclive.live import Live  # here: half a second that only rank 0 needs to spend

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
    """The whole lines of a log; a crash may have torn the last one."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
