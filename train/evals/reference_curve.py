"""Published validation losses of GPT-2 124M on FineWeb, and the comparison of a run with them.

Two public runs of "the same recipe" ended at 3.08 and 3.40: some faults of training show only in
the loss. So each validation of a run that follows the recipe is compared with the curve of a run
known to be good, from the first published step on.

The curve is the log of an llm.c run with 10,485,760 validation tokens (KellerJordan/modded-nanogpt,
records/, 2024-10-13_llmc). The recipe is that of llm.c's scripts/run_gpt2_124M.sh; the log has its
rates: 6e-4 * 251 / 700 at step 250, 0 at the last. OpenAI's GPT-2 124M has 3.4250 there.
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
from pipeline.runtime.errors import UserError
from pipeline.store import atomic

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

COMPARABLE: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "train": {"batch_tokens": 524288, "batch_doublings": 0, "init": "scratch"},
}
"""Parameters that a run must share with the published one for losses of the same step to be
comparable: the same model has seen equally many tokens."""

RECIPE: dict[str, dict[str, Any]] = {
    "model": {"positions": "learned", "qk_norm": False, "activation": "gelu", "zero_init": False},
    "train": {
        "steps": 19560,
        "optimizer": "adamw",
        "learning_rate": 6e-4,
        "schedule": "cosine",
        "min_lr_ratio": 0.0,
        "warmup_steps": 700,
        "weight_decay": 0.1,
        "embeddings_decay": True,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "grad_clip": 1.0,
    },
}
"""Parameters that the published loss depends on as well. With others, a higher loss is no sign
of a fault: at step 18,000 a cosine to a tenth has a rate 6 times that of a cosine to zero."""

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
        if self.below:
            return f"{text}: lower by {-self.difference:.3f}"
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
    """Return why no loss of a run compares with the published one; None if they are comparable.

    Args:
        model: Model config, as in a checkpoint's `state.json`.
        train: Section `train`, likewise.
        raw: Source of the text.
    """
    for name, section in (("model", model), ("train", train)):
        if differs := _difference(name, section, COMPARABLE[name]):
            return differs
    if train.get("document_masking"):
        return "train.document_masking is true, but documents see each other in the published run"
    if len(raw.sources) > 1:
        return (
            f"the text is from {' and '.join(raw.sources)}, but from FineWeb in the published run"
        )
    names = [
        *(source.repo for source in raw.sources.values()),
        *(file.path for file in raw.files[:1]),
    ]  # of local files: the path
    text = " ".join(names).lower()
    if "fineweb" not in text or "edu" in text:
        return f"the text is from {names[0]}, but from FineWeb in the published run"
    return None


def other_recipe(model: Mapping[str, Any], train: Mapping[str, Any]) -> str | None:
    """Return how a run differs from the published recipe; None if it does not.

    The arguments are those of `recipe_mismatch`.
    """
    return _difference("model", model, RECIPE["model"]) or _difference(
        "train", train, RECIPE["train"]
    )


def _difference(name: str, section: Mapping[str, Any], published: Mapping[str, Any]) -> str | None:
    for key, value in published.items():
        found = section.get(key, value)  # a key that is newer than the run had its default
        if found != value:
            return f"{name}.{key} is {found}, but {value} in the published run"
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


def verdict(compared: list[Point], other: str | None = None) -> str:
    """Summarise the points in a line: the last decides.

    Args:
        compared: Points by step.
        other: How the recipe differs from the published one (`other_recipe`). Such a run can be
            better, but is never off.
    """
    if not compared:
        return f"none yet: the first published step is {min(CURVE)}"
    last = compared[-1]
    if other is not None:
        better = f"better than published, {last}; with another recipe: {other}"
        return better if last.below else f"does not apply: {other}"
    first_above = next((point for point in compared if point.above), None)
    if last.above:
        return f"off, {first_above}; look for a fault"
    earlier = f" (before: {first_above})" if first_above else ""
    return f"{'better than' if last.below else 'as'} published, {last}{earlier}"


def read_validations(path: Path) -> dict[int, float]:
    """Read validation losses by step from a file of DVCLive; empty if there is no file.

    Raises:
        UserError: The file is damaged.
    """
    if not path.exists():
        return {}
    try:
        rows = csv.DictReader(atomic.read_bytes(path).decode().splitlines(), delimiter="\t")
        return {int(row["step"]): float(row["loss"]) for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error):
        raise UserError(f"{path}: damaged; run python -m train.launch, which writes it") from None


def as_csv(steps: Iterable[int]) -> str:
    """Write the published losses of these steps as CSV, columns step and reference."""
    lines = [f"{step},{loss:.3f}" for step in steps if (loss := published_loss(step)) is not None]
    return "\n".join(["step,reference", *lines]) + "\n"
