"""The published validation losses of GPT-2 124M on FineWeb, and how a run compares.

Two public runs of "the same recipe" ended at 3.08 and 3.40: training has faults that nothing shows
but the loss. So each validation of a run that follows the recipe is held against the curve of a
run that is known to be good, from the first published step on.

The curve is the log of an llm.c run: 524,288 tokens a step, windows of 1,024, learning rate 6e-4
falling along a cosine over 19,560 steps, 10,485,760 validation tokens (KellerJordan/modded-nanogpt,
records/, 2024-10-13_llmc). GPT-2 124M as OpenAI published it comes to 3.4250 there.
"""

from __future__ import annotations

import csv
import io
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
"""Step: validation loss, nats a token."""

RECIPE: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "train": {"batch_tokens": 524288, "batch_doublings": 0, "init": "scratch"},
}
"""What a run must share with the published one for the curve to say anything."""

# Another validation split moves the loss a little, more so where it still falls fast. On the
# published split only the seeds differ, which are good for some thousandths.
EARLY, LATE, EXACT = 0.10, 0.05, 0.02
EARLY_STEPS = 1000


@dataclass(frozen=True)
class Point:
    """A validation beside the published loss; losses in nats a token."""

    step: int
    loss: float
    reference: float
    tolerance: float

    @classmethod
    def at(cls, step: int, loss: float, *, exact: bool = False) -> Point | None:
        """The point of a step; None where nothing is published.

        Args:
            step: Complete steps.
            loss: Validation loss.
            exact: Whether it was measured on the published validation tokens.
        """
        reference = published(step)
        if reference is None:
            return None
        loose = EARLY if step < EARLY_STEPS else LATE
        return cls(step, loss, reference, EXACT if exact else loose)

    @property
    def difference(self) -> float:
        """How far it lies above the curve."""
        return self.loss - self.reference

    @property
    def above(self) -> bool:
        """Whether it is worse than the tolerance allows."""
        return not self.difference <= self.tolerance  # so that NaN is, too

    @property
    def below(self) -> bool:
        """Whether it is better than the tolerance allows."""
        return self.difference < -self.tolerance

    def __str__(self) -> str:
        text = f"at step {self.step}: {self.loss:.3f}, reference {self.reference:.3f}"
        if self.above:
            return f"{text}: too high by {self.difference:.3f} (tolerance {self.tolerance:.2f})"
        return text


def published(step: int) -> float | None:
    """The published loss of a step; between two steps only where they hardly differ."""
    if step in CURVE:
        return CURVE[step]
    for (a, high), (b, low) in pairwise(CURVE.items()):
        if a < step < b and high - low < LATE:
            part = math.log(step / a) / math.log(b / a)  # the loss falls with the logarithm
            return high + part * (low - high)
    return None


def why_not(model: Mapping[str, Any], train: Mapping[str, Any], source: RawManifest) -> str | None:
    """Why the curve says nothing of a run; None where it does.

    Args:
        model: The model's config, as in a checkpoint's state.
        train: The section `train`, likewise.
        source: Where the text comes from.
    """
    for name, section in (("model", model), ("train", train)):
        for key, value in RECIPE[name].items():
            if section.get(key) != value:
                return f"{name}.{key} is {section.get(key)}, the published run's {value}"
    names = [source.source.repo, *(file.path for file in source.files[:1])]  # the user's own files
    words = " ".join(names).lower()
    if "fineweb" not in words or "edu" in words:
        return f"the text is of {names[0]}, the published run's of FineWeb"
    return None


def points(validations: Mapping[int, float], exact: Mapping[int, float]) -> list[Point]:
    """The comparable ones of a run's validations, by step.

    Args:
        validations: Step: loss on the run's own validation split.
        exact: The same on the published validation tokens; wins where a step has both.
    """
    found = {step: Point.at(step, loss) for step, loss in validations.items()}
    found |= {step: Point.at(step, loss, exact=True) for step, loss in exact.items()}
    return [point for _, point in sorted(found.items()) if point is not None]


def verdict(compared: list[Point]) -> str:
    """What the points come to, in a line; the first that is too high decides."""
    if not compared:
        return f"none yet: the first published step is {min(CURVE)}"
    if worst := next((point for point in compared if point.above), None):
        return f"off, {worst}; look for a fault"
    last = compared[-1]
    if last.below:
        return f"better than published, {last}"
    return f"as published, {last}"


def read_validations(path: Path) -> dict[int, float]:
    """A run's validations, step: loss, as DVCLive wrote them; none where there is no such file."""
    if not path.exists():
        return {}
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t")
    return {int(row["step"]): float(row["loss"]) for row in rows}


def as_csv(steps: Iterable[int]) -> str:
    """The published losses of these steps, columns step and reference."""
    lines = [f"{step},{loss:.3f}" for step in steps if (loss := published(step)) is not None]
    return "\n".join(["step,reference", *lines]) + "\n"
