"""The results by which a study may decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A result of the evaluation.

    Attributes:
        key: Its name in `artifacts/evaluation.json`, or without a held-out text.
        unit: For messages.
        lower_is_better: Whether it is a loss.
        task: Key of `evaluate` that it needs.
        held_out_key: Its name where the study has a held-out text.
    """

    key: str
    unit: str
    lower_is_better: bool
    task: str | None = None
    held_out_key: str | None = None

    def value(self, evaluation: Mapping[str, Any], held_out: bool) -> float:
        """Return the value of a run, NaN where it has none."""
        key = self.held_out_key if held_out and self.held_out_key else self.key
        value = evaluation.get(key)
        return float(value) if isinstance(value, int | float) else math.nan


METRICS = {
    "bits_per_byte": Metric(
        "bits_per_byte", "bits per byte", True, held_out_key="held_out_bits_per_byte"
    ),
    "val_loss": Metric("val_loss", "nats per token", True),
    "hellaswag_acc_norm": Metric("hellaswag_acc_norm", "of HellaSwag", False, "hellaswag"),
    "hellaswag_acc": Metric("hellaswag_acc", "of HellaSwag", False, "hellaswag"),
    "lambada_acc": Metric("lambada_acc", "of LAMBADA", False, "lambada"),
}
