"""Comparison of several experiments on one page: `python -m train.report --compare REV...`.

Each experiment is read at its revision, from git and DVC's cache. Nothing is checked out, and the
working tree stays unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from train.report import html
from train.report.charts import SERIES, Curve, line_chart, running_mean
from train.report.run_log import Log, sample_texts

OUT = Path("artifacts/compare.html")
WORKSPACE = "workspace"

# Key in the results of training and evaluation, name, and which value is better.
METRICS = (
    ("val_loss", "validation loss", min),
    ("best_val_loss", "lowest validation loss", min),
    ("perplexity", "perplexity", min),
    ("bits_per_byte", "bits per byte", min),
    ("held_out_bits_per_byte", "held-out bits per byte", min),
    ("hellaswag_acc_norm", "HellaSwag acc_norm", max),
    ("hellaswag_acc", "HellaSwag acc", max),
    ("lambada_acc", "LAMBADA accuracy", max),
    ("loss", "training loss", min),
    ("parameters", "parameters", None),
    ("tokens", "training tokens", None),
    ("tokens_per_second", "tokens per second", max),
    ("mfu", "MFU", max),
    ("seconds", "training time, seconds", min),
    ("peak_memory_bytes", "peak memory, bytes", min),
)


@dataclass(frozen=True)
class Experiment:
    """Parameters and results of one revision."""

    name: str  # revision, as given on the command line
    params: dict[str, Any]  # values by `section.key`
    metrics: dict[str, Any]  # results of training and evaluation
    log: Log  # curves and samples


def read(rev: str) -> Experiment:
    """Read the experiment at a revision.

    Raises:
        UserError: The revision does not exist, or DVC does not have its outputs.
    """
    # Imported here because it takes a second.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    try:
        files = DVCFileSystem(rev=None if rev == WORKSPACE else rev)

        def content(path: str) -> bytes:
            if rev == WORKSPACE and (here := Path(files.repo.root_dir, path)).exists():
                atomic.check_regular(here)
            return bytes(files.read_bytes(f"/{path}"))

        def mapping(path: str, parse: Callable[[bytes], Any]) -> dict[str, Any]:
            try:
                value = parse(content(path))
            except (ValueError, YAMLError):
                value = None
            if not isinstance(value, dict):
                raise UserError(f"--compare {rev}: {path} is damaged; run the experiment again")
            return value

        params = mapping("params.yaml", YAML(typ="safe", pure=True).load)
        training, evaluation = (
            mapping(f"artifacts/{name}.json", json.loads) for name in ("training", "evaluation")
        )
        log = Log.parse(content("artifacts/log.jsonl"), f"{rev}: artifacts/log.jsonl")
    except SCMError as error:
        raise UserError(f"--compare {rev}: {error}; `dvc exp list -A` lists experiments") from None
    except FileNotFoundError as error:
        raise UserError(
            f"--compare {rev}: {error.filename or error} is missing; run the experiment, or get it "
            "with `dvc exp pull` or `dvc pull`"
        ) from None
    except DvcException as error:
        raise UserError(f"--compare {rev}: {error}") from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}"
        raise UserError(f"--compare {rev}: {what}; run the experiment again") from None
    return Experiment(
        name=rev,
        params={
            f"{section}.{key}": value
            for section, values in params.items()
            if isinstance(values, dict)
            for key, value in values.items()
        },
        metrics=training | evaluation,
        log=log,
    )


def render(revs: Sequence[str]) -> str:
    """Return the page that compares these revisions, in this order.

    Raises:
        UserError: One cannot be read, or there are more than the chart has colours.
    """
    names = list(dict.fromkeys(revs))
    if len(names) > len(SERIES):
        raise UserError(
            f"--compare: {len(names)} experiments, but a chart has {len(SERIES)} colours; compare "
            "fewer, or list them with `dvc exp show`"
        )
    experiments = [read(rev) for rev in names]
    return html.render(
        "compare.html",
        experiments=experiments,
        colors=SERIES,
        params=differing_params(experiments),
        metrics=metric_rows(experiments),
        loss_charts=[_loss_chart(experiments, wide=wide) for wide in (True, False)],
        charts=[
            (title, note, svg)
            for key, title, note, unit in (
                ("train/loss", "Training loss", "running mean", "nats per token"),
                ("lr", "Learning rate", "", "learning rate"),
                ("grad_norm", "Gradient norm", "running mean", "norm"),
            )
            if (svg := _chart(experiments, key, title, unit, smoothed="mean" in note))
        ],
        samples=[
            (one.name, "".join(sample_texts(samples[-1][1])).strip())
            for one in experiments
            if (samples := one.log.samples())
        ],
    )


def differing_params(experiments: Sequence[Experiment]) -> list[tuple[str, list[Any]]]:
    """Return (key, value per experiment) of the parameters that are not equal in all."""
    keys = list(dict.fromkeys(key for one in experiments for key in one.params))
    rows = [(key, [one.params.get(key) for one in experiments]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def metric_rows(experiments: Sequence[Experiment]) -> list[tuple[str, list[tuple[Any, bool]]]]:
    """Return (name, (value, whether it is the best) per experiment) of all known metrics."""
    rows = []
    for key, name, better in METRICS:
        values = [one.metrics.get(key) for one in experiments]
        known = [value for value in values if value is not None]
        if known:
            best = better(known) if better and len(set(known)) > 1 else None
            rows.append((name, [(value, value is not None and value == best) for value in values]))
    return rows


def _loss_chart(experiments: Sequence[Experiment], *, wide: bool) -> str:
    curves = [
        Curve(one.name, *one.log.curve("val/loss"), color)
        for one, color in zip(experiments, SERIES, strict=False)
    ]
    name = "Validation loss by step"
    return line_chart(curves, name=name, y_label="validation loss, nats per token", wide=wide)


def _chart(
    experiments: Sequence[Experiment], key: str, title: str, unit: str, *, smoothed: bool
) -> str:
    """Draw one curve per experiment; return "" if none has it."""
    curves, lows, highs = [], [], []
    for one, color in zip(experiments, SERIES, strict=False):
        steps, values = one.log.curve(key)
        if not steps:
            continue
        if smoothed:
            values = running_mean(values, memory=max(2, len(values) // 30))
        settled = [v for s, v in zip(steps, values, strict=True) if s >= steps[-1] / 20]
        lows.append(min(settled))
        highs.append(max(settled))
        curves.append(Curve(one.name, steps, values, color))
    if not curves:
        return ""
    margin = 0.06 * (max(highs) - min(lows)) or 1.0
    y_range = (min(lows) - margin, max(highs) + margin)
    return line_chart(curves, name=f"{title} by step", y_label=unit, y_range=y_range)
