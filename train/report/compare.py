"""Several experiments in one page: `python -m train.report --compare REV...`.

Each is read at its revision, from git and DVC's cache; nothing is checked out, and what the working
tree holds stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError
from train.report import html
from train.report.charts import SERIES, Curve, line_chart, smooth
from train.report.run_log import Log

OUT = Path("artifacts/compare.html")
WORKSPACE = "workspace"

# (key of the metrics, its name, which end is better)
METRICS = (
    ("val_loss", "validation loss", min),
    ("best_val_loss", "lowest validation loss", min),
    ("perplexity", "perplexity", min),
    ("bits_per_byte", "bits a byte", min),
    ("hellaswag_acc_norm", "HellaSwag acc_norm", max),
    ("hellaswag_acc", "HellaSwag acc", max),
    ("lambada_acc", "LAMBADA accuracy", max),
    ("loss", "training loss", min),
    ("parameters", "parameters", None),
    ("tokens", "tokens trained on", None),
    ("tokens_per_second", "tokens a second", max),
    ("mfu", "MFU", max),
    ("seconds", "seconds of training", min),
    ("peak_memory_bytes", "bytes of memory", min),
)


@dataclass(frozen=True)
class Result:
    """An experiment: what it was, and what came of it.

    Attributes:
        name: As it was asked for.
        params: `section.key`: value.
        metrics: Of training and evaluation.
        log: Its curves and samples.
    """

    name: str
    params: dict[str, Any]
    metrics: dict[str, Any]
    log: Log


def read(rev: str) -> Result:
    """The experiment at a revision.

    Raises:
        UserError: There is no such revision, or DVC has nothing of what it made.
    """
    # Here: they take a second to import.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    try:
        files = DVCFileSystem(rev=None if rev == WORKSPACE else rev)

        def text(path: str) -> str:
            return str(files.read_text(f"/{path}", encoding="utf-8"))

        params = YAML(typ="safe", pure=True).load(text("params.yaml"))
        metrics = [json.loads(text(f"metrics/{name}.json")) for name in ("eval", "train")]
        log = Log.parse(text("artifacts/log.jsonl"))
    except SCMError as error:
        raise UserError(f"--compare {rev}: {error}; `dvc exp list -A` names experiments") from None
    except FileNotFoundError as error:
        raise UserError(
            f"--compare {rev}: nothing of {error.filename or error} is here; run it, or "
            "`dvc exp pull` or `dvc pull` what others ran"
        ) from None
    except DvcException as error:
        raise UserError(f"--compare {rev}: {error}") from None
    return Result(
        name=rev,
        params={
            f"{section}.{key}": value
            for section, values in params.items()
            for key, value in values.items()
        },
        metrics=metrics[1] | metrics[0],
        log=log,
    )


def render(revs: Sequence[str]) -> str:
    """The page of these revisions, in their order.

    Raises:
        UserError: One cannot be read, or there are more than can be told apart.
    """
    names = list(dict.fromkeys(revs))
    if len(names) > len(SERIES):
        raise UserError(
            f"--compare: {len(names)} experiments; give at most {len(SERIES)}, more cannot be told "
            "apart in a chart (`dvc exp show` lists any number)"
        )
    results = [read(rev) for rev in names]
    return html.page(
        "compare.html",
        results=results,
        colors=SERIES,
        params=differing([result.params for result in results]),
        metrics=measures(results),
        loss_charts=[_losses(results, wide=wide) for wide in (True, False)],
        charts=[
            (title, note, svg)
            for key, title, note, unit in (
                ("train/loss", "Training loss", "running mean", "nats a token"),
                ("lr", "Learning rate", "", "learning rate"),
                ("grad_norm", "Gradient norm", "running mean", "norm"),
            )
            if (svg := _chart(results, key, title, unit, smoothed="mean" in note))
        ],
        samples=[
            (result.name, _text(tokens[-1][1]).strip())
            for result in results
            if (tokens := result.log.samples())
        ],
    )


def differing(params: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(key, its value in each) of the parameters that are not the same in all."""
    keys = list(dict.fromkeys(key for one in params for key in one))
    rows = [(key, [one.get(key) for one in params]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def measures(results: Sequence[Result]) -> list[tuple[str, list[tuple[Any, bool]]]]:
    """(name, for each its value and whether it is the best) of what any of them measured."""
    rows = []
    for key, name, better in METRICS:
        values = [result.metrics.get(key) for result in results]
        known = [value for value in values if value is not None]
        if known:
            best = better(known) if better and len(set(known)) > 1 else None
            rows.append((name, [(value, value is not None and value == best) for value in values]))
    return rows


def _losses(results: Sequence[Result], *, wide: bool) -> str:
    curves = [
        Curve(result.name, *result.log.curve("val/loss"), color)
        for result, color in zip(results, SERIES, strict=False)
    ]
    name = "Validation loss by step"
    return line_chart(curves, name=name, y_label="validation loss, nats a token", wide=wide)


def _chart(results: Sequence[Result], key: str, title: str, unit: str, *, smoothed: bool) -> str:
    """One curve of each; empty where none has it."""
    curves, lows, highs = [], [], []
    for result, color in zip(results, SERIES, strict=False):
        steps, values = result.log.curve(key)
        if not steps:
            continue
        if smoothed:
            values = smooth(values, memory=max(2, len(values) // 30))
        settled = [v for s, v in zip(steps, values, strict=True) if s >= steps[-1] / 20]
        lows.append(min(settled))
        highs.append(max(settled))
        curves.append(Curve(result.name, steps, values, color))
    if not curves:
        return ""
    margin = 0.06 * (max(highs) - min(lows)) or 1.0
    y_range = (min(lows) - margin, max(highs) + margin)
    return line_chart(curves, name=f"{title} by step", y_label=unit, y_range=y_range)


def _text(tokens: list[int]) -> str:
    return tokenizer.decode([token for token in tokens if token != tokenizer.EOT])
