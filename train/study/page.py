"""The page of a study, `artifacts/study.html`: the same results give the same bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.report import html
from train.report.charts import SERIES, Curve, dot_chart, line_chart
from train.report.html import duration, number
from train.study import statistics
from train.study.definition import Overlay
from train.study.findings import Findings, Finished, Found, tokens_of, training_seconds

OUT = Path("artifacts/study.html")


def render(found: Findings) -> str:
    """Return the page."""
    study = found.study
    keys = {
        one.record["dataset_key"]
        for runs in found.runs.values()
        for one in runs
        if one.record and "dataset_key" in one.record
    }
    return html.render(
        "study.html",
        name=study.name,
        title=study.title or study.name,
        verdicts=found.verdicts(),
        unit=study.metric.unit,
        better="lower" if study.metric.lower_is_better else "higher",
        metric=study.file.metric,
        alpha=study.file.alpha,
        held_out=study.file.held_out,
        held_out_sha256=study.held_out_sha256,
        paired=study.file.pair_seeds,
        seeds=study.seeds,
        budget=_budget(found),
        same_data=len(keys) <= 1,
        variants=[_variant_row(found, name) for name in study.variants],
        comparisons=[_row(one) for one in found.comparisons],
        all_pairs=[_row(one) for one in found.all_pairs] if study.file.compare != "all" else [],
        runs=[_run_row(one) for runs in found.runs.values() for one in runs],
        noise_chart=_noise_chart(found),
        curves=[_curves(found, wide=wide) for wide in (True, False)],
        seconds=duration(found.seconds),
        n_runs=sum(one.training is not None for runs in found.runs.values() for one in runs),
    )


def _budget(found: Findings) -> str:
    budget = found.study.file.budget
    if budget.tokens is not None:
        return f"{budget.tokens:,} tokens"
    return f"{budget.seconds:g} s of training, by the measured time of a step"


def _variant_row(found: Findings, name: str) -> dict[str, Any]:
    runs, study = found.runs[name], found.study
    n, mean, std = statistics.seed_noise([one.value for one in runs])
    steps = runs[0].run.params["train"]["steps"]
    return {
        "name": name,
        "color": SERIES[list(found.runs).index(name) % len(SERIES)],
        "changes": ", ".join(_changes(study.changes[name])) or "the base",
        "n": n,
        "mean": _round(mean),
        "std": _round(std),
        "steps": steps,
        "tokens": tokens_of(runs[0].run, steps),
        "seconds": duration(training_seconds(runs)),
    }


def _changes(overlay: Overlay) -> Iterator[str]:
    """Yield `section.key: value`, and `sources.name.key: value`."""
    for section, values in overlay.items():
        for key, value in values.items():
            inner = value if section == "sources" else {"": value}
            for last, one in inner.items():
                yield f"{'.'.join(filter(None, (section, key, last)))}: {json.dumps(one)}"


def _row(found: Found) -> dict[str, Any]:
    result = found.result
    return {
        "first": found.first,
        "second": found.second,
        "difference": f"{result.mean:+.3g}" if result.n else "–",
        "half_width": f"{result.half_width:.2g}" if math.isfinite(result.half_width) else "–",
        "p": "–" if found.p is None else f"{found.p:.2g}",
        "p_raw": "–" if result.p is None else f"{result.p:.2g}",
        "p_permutation": "–" if result.p_permutation is None else f"{result.p_permutation:.2g}",
        "n": result.n,
        "better": found.better,
        "preliminary": found.preliminary,
        "resolves": "" if found.resolves is None else f"{found.resolves:.3g}",
        "more_seeds": found.more_seeds,
        "more_time": "" if found.more_seconds is None else duration(found.more_seconds),
        "open": found.resolves is not None,
    }


def _run_row(one: Finished) -> dict[str, Any]:
    training, record = one.training, one.record or {}
    return {
        "experiment": one.run.experiment,
        "seed": one.run.params["train"]["seed"],
        "value": one.failed or ("not finished" if one.record is None else number(one.value)),
        "val_loss": number(training["val_loss"]) if training else "–",
        "seconds": duration(training["seconds"]) if training else "–",
        "dataset": record.get("dataset_key", "–")[:12],
    }


def _noise_chart(found: Findings) -> str:
    values = {
        name: [one.value for one in runs if math.isfinite(one.value)]
        for name, runs in found.runs.items()
    }
    return dot_chart(
        list(values),
        list(values.values()),
        name="Results by variant: seeds, mean and standard deviation",
        x_label=found.study.metric.unit,
    )


def _curves(found: Findings, *, wide: bool) -> str:
    curves = []
    for number_, (name, runs) in enumerate(found.runs.items()):
        by_step: dict[int, list[float]] = {}
        for one in runs:
            for step, loss in (one.training or {}).get("validations", []):
                by_step.setdefault(step, []).append(loss)
        if not by_step:
            continue
        rows = [(step, *statistics.seed_noise(losses)) for step, losses in sorted(by_step.items())]
        curves.append(
            Curve(
                name,
                [tokens_of(runs[0].run, row[0]) for row in rows],
                [row[2] for row in rows],
                SERIES[number_ % len(SERIES)],
                dashed=number_ >= len(SERIES),
                band=[row[3] if math.isfinite(row[3]) else 0.0 for row in rows],
            )
        )
    if not curves:
        return ""
    return line_chart(
        curves,
        name="Validation loss by tokens: mean over the seeds, and standard deviation",
        y_label="validation loss, nats per token",
        x_label="tokens",
        wide=wide,
    )


def _round(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else "–"
