"""Log of a run (`artifacts/log.jsonl`, written by train.monitor.history) as curves and samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.format import tokenizer
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


def sample_text(tokens: list[int]) -> str:
    """Decode tokens of a sample, without <|endoftext|>."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.EOT])
