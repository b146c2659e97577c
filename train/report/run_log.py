"""Log of a run (`artifacts/log.jsonl`, written by train.monitor.history) as curves and samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.format import tokenizer
from pipeline.store import atomic
from train.monitor import history


@dataclass(frozen=True)
class Log:
    """Records of a log, oldest first."""

    records: list[dict[str, Any]]

    @classmethod
    def parse(cls, data: bytes, name: str = "") -> Log:
        """Parse a log file; for the arguments and damaged lines see `history.parse`."""
        return cls(history.parse(data, name))

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and finite values of a curve, such as "train/loss"; empty: not logged."""
        found = [
            (record["step"], record[name])
            for record in self.records
            if name in record and abs(record[name]) < 1e300  # room for margins; False for NaN
        ]
        return [step for step, _ in found], [value for _, value in found]

    def incidents(self) -> list[str]:
        """List loss spikes and skipped steps (train.monitor.health) as text."""
        return [
            f"step {record['step']:,}: "
            + (f"loss spike to {record['spike']:.4f}" if "spike" in record else "skipped")
            for record in self.records
            if "spike" in record or "skipped" in record
        ]

    def samples(self) -> list[tuple[int, list[int]]]:
        """Return (step, tokens) of each sample: a fixed prompt with the continuation."""
        return [(record["step"], record["sample"]) for record in self.records if "sample" in record]


TAIL = 500  # bytes, of about two lines


class LogReader:
    """Reader of the log of a running run: a reading parses what was added since the one before.

    A resumed run replaces its log by a shorter one. So each reading starts with the last bytes of
    the one before; if they are no longer there, the log is read again from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[dict[str, Any]] = []
        self._end, self._tail = 0, b""  # of the complete lines that were read

    def read(self) -> Log:
        """Return the log as it is now; a last line without an end is parsed again the next time.

        Raises:
            OSError: It cannot be read, or is no file.
        """
        atomic.check_regular(self.path)
        with open(self.path, "rb") as file:
            file.seek(self._end - len(self._tail))
            data = file.read()
            if not data.startswith(self._tail):
                self._records, self._end, self._tail = [], 0, b""
                file.seek(0)
                data = file.read()
        old, end = len(self._tail), data.rfind(b"\n") + 1
        self._records += history.parse(data[old:end])
        self._end, self._tail = self._end + end - old, data[max(0, end - TAIL) : end]
        return Log(self._records + history.parse(data[end:]))


def sample_texts(tokens: list[int]) -> tuple[str, str]:
    """Decode the prompt and the continuation of a sample, without <|endoftext|>."""
    prompt, continuation = tokens[: history.SAMPLE_PROMPT], tokens[history.SAMPLE_PROMPT :]
    return _text(prompt), _text(continuation)


def _text(tokens: list[int]) -> str:
    return tokenizer.decode([token for token in tokens if token != tokenizer.EOT])
