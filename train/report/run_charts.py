"""Charts of a run's report, drawn from its log, its tables and its model."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.store import atomic
from train.monitor.history import SOURCE_LOSS
from train.report.charts import SERIES, Curve, bar_chart, line_chart, running_mean
from train.report.run_log import Log

if TYPE_CHECKING:
    from model import GPT

METRICS = Path("metrics")

Chart = tuple[str, str, str]
"""Title, note and SVG of a chart."""


def loss_chart(log: Log, evaluation: Mapping[str, Any], *, wide: bool) -> str:
    """Draw training and validation loss, unigram entropy, and the published run if comparable.

    Args:
        evaluation: Results of evaluation; empty: of a run that has not been evaluated.
    """
    train, val = log.curve("train/loss"), log.curve("val/loss")
    mean = running_mean(train[1], memory=max(2, len(train[1]) // 200))
    curves = [
        Curve("training", *train, "c1", faint=True),
        Curve("training, running mean", train[0], mean, "c1"),
        Curve("validation", *val, "c2"),
    ]
    curves = [curve for curve in curves if curve.xs]  # damage may have cost all points of one
    steps = [curve.xs[i] for i in (0, -1) for curve in curves] or [0, 1]
    ends = [min(steps), max(steps)]
    unigram = [evaluation["unigram_entropy"]] if "unigram_entropy" in evaluation else []
    if unigram:
        curves.append(Curve("unigram entropy", ends, unigram * 2, "soft", dashed=True))
    if evaluation and (published := _read_csv(METRICS / "reference.csv")):
        xs = [int(row["step"]) for row in published]
        ys = [float(row["reference"]) for row in published]
        curves.append(Curve("published run", xs, ys, "c3", dashed=True))
    # The first steps fall from ln V: in full, they would flatten the rest of the curve.
    settled = [y for x, y in zip(*train, strict=True) if x >= ends[1] / 20]
    values = [*settled, *val[1], *unigram]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    return line_chart(
        curves,
        name="Training and validation loss by step",
        y_label="nats per token",
        y_range=(low - margin, high + margin),
        wide=wide,
    )


def source_chart(log: Log, *, wide: bool) -> str | None:
    """Draw the validation loss of each source; None for a single source."""
    names = sorted({k for record in log.records for k in record if k.startswith(SOURCE_LOSS)})
    curves = [
        Curve(name.removeprefix(SOURCE_LOSS), *log.curve(name), color, dashed=number >= len(SERIES))
        for number, (name, color) in enumerate(zip(names, cycle(SERIES), strict=False))
    ]
    if not curves:
        return None
    return line_chart(
        curves, name="Validation loss of each source by step", y_label="nats per token", wide=wide
    )


def training_charts(log: Log) -> list[Chart]:
    """Draw the other curves that were logged."""
    charts = []
    for key, title, note, unit, color in (
        ("val/hellaswag", "HellaSwag accuracy", "completion; chance: 25 %", "%", "c2"),
        ("lr", "Learning rate", "", "learning rate", "c1"),
        ("grad_norm", "Gradient norm", "before clipping, logarithmic", "norm", "c4"),
        ("tokens_per_second", "Throughput", "", "tokens per second", "c3"),
        ("mfu", "MFU", "of the device's peak", "%", "c3"),
        ("data_wait", "Data wait", "of the step time", "%", "c5"),
        ("memory_gb", "Memory", "of rank 0", "GB", "c5"),
    ):
        steps, values = log.curve(key)
        if not steps:
            continue
        if unit == "%":
            values = [100 * value for value in values]
        curve, name = Curve(title, steps, values, color), f"{title} by step"
        log_scale = key == "grad_norm"
        y_range = (None if log_scale else 0, None)
        svg = line_chart([curve], name=name, y_label=unit, y_range=y_range, log_scale=log_scale)
        charts.append((title, note, svg))
    return charts


def data_charts() -> list[Chart]:
    """Draw the tables of the verify stage that are not empty."""
    charts = []
    for key, column, title in (
        ("document_lengths", "tokens", "Documents by length in tokens"),
        ("hosts", "host", "Documents by host"),
        ("dumps", "dump", "Documents by dump"),
    ):
        if rows := _read_csv(METRICS / f"{key}.csv"):
            labels, counts = [row[column] for row in rows], [int(row["documents"]) for row in rows]
            note = "" if key == "document_lengths" else "the largest"
            charts.append((title, note, bar_chart(labels, counts, name=title)))
    return charts


def layer_charts(gpt: GPT, tokens: np.ndarray) -> list[Chart]:
    """Draw the RMS of weights, and of activations for tokens (B, T), by layer; on the CPU."""
    from train.report import model_probe  # here: the live page of a run needs no torch

    layers = list(range(1, gpt.config.n_layer + 1))
    charts = []
    for title, sizes in (
        ("Weights", model_probe.weight_rms(gpt)),
        ("Activations", model_probe.activation_rms(gpt, tokens)),
    ):
        curves = [
            Curve(name, layers, values, color)
            for (name, values), color in zip(sizes.items(), SERIES, strict=False)
        ]
        svg = line_chart(curves, name=f"{title} by layer", y_label="RMS", x_label="layer")
        charts.append((title, "by layer", svg))
    return charts


def _read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if it does not exist."""
    if not path.exists():
        return []
    return list(csv.DictReader(io.StringIO(atomic.read_bytes(path).decode())))
