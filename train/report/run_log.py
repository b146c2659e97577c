"""The log of a run as its readers see it: curves and samples, by step (written by history.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Log:
    """The records of `artifacts/log.jsonl`, oldest first."""

    records: list[dict[str, Any]]

    @classmethod
    def parse(cls, text: str) -> Log:
        """The log in a file's text."""
        return cls([json.loads(line) for line in text.splitlines()])

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a curve, such as "train/loss"; empty where it was not logged."""
        found = [(record["step"], record[name]) for record in self.records if name in record]
        return [step for step, _ in found], [value for _, value in found]

    def incidents(self) -> list[str]:
        """Steps whose loss leapt, or whose update was left out (health.py), as lines to read."""
        return [
            f"step {record['step']:,}: "
            + (f"the loss leapt to {record['spike']:.4f}" if "spike" in record else "was skipped")
            for record in self.records
            if "spike" in record or "skipped" in record
        ]

    def samples(self) -> list[tuple[int, list[int]]]:
        """(step, tokens) of the samples: the same prompt each time, and what was added to it."""
        return [(record["step"], record["sample"]) for record in self.records if "sample" in record]
