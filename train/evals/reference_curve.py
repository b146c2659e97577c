"""Published validation losses of GPT-2 124M on FineWeb, and the comparison of a run with them.

Two public runs of "the same recipe" ended at 3.08 and 3.40: some faults of training show only in
the loss. So each validation of a run that follows the recipe is compared with the curve of a run
known to be good, from the first published step on.

The curve is the log of an llm.c run: 524,288 tokens per step, windows of 1,024 tokens, learning
rate 6e-4 with cosine decay over 19,560 steps, 10,485,760 validation tokens
(KellerJordan/modded-nanogpt, records/, 2024-10-13_llmc). OpenAI's GPT-2 124M has 3.4250 there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.format.manifest import RawManifest

CURVE = {
    250: 6.171,
    500: 5.374,
    1000: 4.317,
    2500: 3.765,
    5000: 3.554,
    10000: 3.392,
    15000: 3.300,
    19560: 3.272,
}
"""Validation loss in nats per token, by step."""

RECIPE: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "train": {"batch_tokens": 524288, "batch_doublings": 0, "init": "scratch"},
}
"""Parameters that a run must share with the published one to be comparable."""

# Tolerances. Another validation split shifts the loss a little, and more while it falls fast. On
# the published split only the seed differs, which shifts it by a few thousandths.
EARLY, LATE, EXACT = 0.10, 0.05, 0.02
EARLY_STEPS = 1000


@dataclass(frozen=True)
class Point:
    """A validation loss and the published one, in nats per token."""

    step: int
    loss: float
    reference: float
    tolerance: float

    @classmethod
    def at(cls, step: int, loss: float, *, exact: bool = False) -> Point | None:
        """Return the point of a step; None if nothing is published for it.

        Args:
            step: Number of complete steps.
            exact: Whether it was measured on the published validation tokens.
        """
        reference = published_loss(step)
        if reference is None:
            return None
        loose = EARLY if step < EARLY_STEPS else LATE
        return cls(step, loss, reference, EXACT if exact else loose)

    @property
    def difference(self) -> float:
        """Loss minus published loss."""
        return self.loss - self.reference

    @property
    def above(self) -> bool:
        """Whether the loss is too high by more than the tolerance, or NaN."""
        return not self.difference <= self.tolerance

    @property
    def below(self) -> bool:
        """Whether the loss is lower by more than the tolerance."""
        return self.difference < -self.tolerance

    def __str__(self) -> str:
        text = f"at step {self.step}: {self.loss:.3f}, reference {self.reference:.3f}"
        if self.above:
            return f"{text}: too high by {self.difference:.3f} (tolerance {self.tolerance:.2f})"
        return text


def published_loss(step: int) -> float | None:
    """Return the published loss; interpolated only between steps less than `LATE` apart in loss."""
    if step in CURVE:
        return CURVE[step]
    for (a, high), (b, low) in pairwise(CURVE.items()):
        if a < step < b and high - low < LATE:
            fraction = math.log(step / a) / math.log(b / a)  # the loss falls with log(step)
            return high + fraction * (low - high)
    return None


def recipe_mismatch(
    model: Mapping[str, Any], train: Mapping[str, Any], raw: RawManifest
) -> str | None:
    """Return how a run differs from the published recipe; None if the two are comparable.

    Args:
        model: Model config, as in a checkpoint's `state.json`.
        train: Section `train`, likewise.
        raw: Source of the text.
    """
    for name, section in (("model", model), ("train", train)):
        for key, value in RECIPE[name].items():
            if section.get(key) != value:
                return f"{name}.{key} is {section.get(key)}, but {value} in the published run"
    names = [raw.source.repo, *(file.path for file in raw.files[:1])]  # of local files: the path
    text = " ".join(names).lower()
    if "fineweb" not in text or "edu" in text:
        return f"the text is from {names[0]}, but from FineWeb in the published run"
    return None


def comparable_points(validations: Mapping[int, float], exact: Mapping[int, float]) -> list[Point]:
    """Return the validations at steps with a published loss, by step.

    Args:
        validations: Loss on the run's own validation split, by step.
        exact: Loss on the published validation tokens, by step; used if a step has both.
    """
    found = {step: Point.at(step, loss) for step, loss in validations.items()}
    found |= {step: Point.at(step, loss, exact=True) for step, loss in exact.items()}
    return [point for _, point in sorted(found.items()) if point is not None]


def verdict(compared: list[Point]) -> str:
    """Summarise the points in a line: the first that is too high decides, else the last."""
    if not compared:
        return f"none yet: the first published step is {min(CURVE)}"
    if worst := next((point for point in compared if point.above), None):
        return f"off, {worst}; look for a fault"
    last = compared[-1]
    if last.below:
        return f"better than published, {last}"
    return f"as published, {last}"


def read_validations(path: Path) -> dict[int, float]:
    """Read validation losses by step from a file of DVCLive; empty if there is no file."""
    if not path.exists():
        return {}
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    return {int(row["step"]): float(row["loss"]) for row in rows}


def as_csv(steps: Iterable[int]) -> str:
    """Write the published losses of these steps as CSV, columns step and reference."""
    lines = [f"{step},{loss:.3f}" for step in steps if (loss := published_loss(step)) is not None]
    return "\n".join(["step,reference", *lines]) + "\n"
