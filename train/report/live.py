"""A run as far as it is, from its folder in the store: for `train.watch` and `train.report --run`.

It reads what training writes (run.json, starts.jsonl, log.jsonl, failed.json, final.json) and
nothing else, so it neither disturbs a run nor needs its data or its model.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from model.size import parameter_count
from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from train.params import ModelParams, TrainParams
from train.report import html, run_charts
from train.report.run_log import Log, LogReader, sample_texts

MOST_RUNS = 50


@dataclass(frozen=True)
class Found:
    """A run in the store.

    Attributes:
        state: "running", "finished", "failed" or "stopped".
        changed: When the last line of the log was written, seconds since the epoch.
        size: Bytes of the log.
    """

    key: str
    folder: Path
    state: str
    changed: float
    size: int

    @property
    def when(self) -> str:
        """Time of the last line of the log."""
        return _minute(datetime.fromtimestamp(self.changed, timezone.utc))


def find_runs(store: Store) -> list[Found]:
    """List the runs that have a log, the running ones first, then by age."""
    found = []
    for path in (store.root / "runs").glob("*/log.jsonl"):
        try:
            folder, status = path.parent, path.stat()
        except OSError:  # removed by now
            continue
        if stat.S_ISREG(status.st_mode):
            state = _state(store, folder)
            found.append(Found(folder.name, folder, state, status.st_mtime, status.st_size))
    return sorted(found, key=lambda run: (run.state == "running", run.changed), reverse=True)


def _state(store: Store, folder: Path) -> str:
    if store.is_locked("runs", folder.name):
        return "running"
    if (folder / "final.json").exists():
        return "finished"
    return "failed" if (folder / "failed.json").exists() else "stopped"


def choose(runs: list[Found], key: str | None) -> Found:
    """Return the run whose key begins so; None: the one that runs, or the newest.

    Raises:
        UserError: There is none, or more than one.
    """
    if not runs:
        raise UserError("no run in the store has a log yet; start one with `dvc repro`")
    if key is None:
        return runs[0]
    matching = [run for run in runs if run.key.startswith(key)]
    if len(matching) != 1:
        known = ", ".join(run.key[:12] for run in runs[:10])
        raise UserError(f"--run {key}: {len(matching)} runs begin so; name one of {known}")
    return matching[0]


def render_body(run: Found, runs: list[Found], reader: LogReader | None = None) -> str:
    """Render a run, and links to the others, as the content of a page.

    Args:
        reader: Of the run's log, for a page that is drawn many times.

    Raises:
        UserError: The log cannot be read.
    """
    reader = reader or LogReader(run.folder / "log.jsonl")
    try:
        log = reader.read()
    except OSError as error:
        raise UserError(f"{reader.path}: {error.strerror}; choose another run") from None
    record, start = _read(run.folder / "run.json"), _last_start(run.folder)
    steps = _steps(record)
    has_curves = len(log.curve("train/loss")[0]) > 0
    return html.render(
        "run.html",
        run=run,
        runs=runs[:MOST_RUNS],
        model=_model(record),
        start=start,
        steps=steps,
        tiles=tiles(run, log, record),
        share=_share(log, steps),
        failure=_read(run.folder / "failed.json").get("what") if run.state == "failed" else None,
        incidents=log.incidents(),
        loss_charts=[run_charts.loss_chart(log, {}, wide=wide) for wide in (True, False)]
        if has_curves
        else [],
        training_charts=run_charts.training_charts(log),
        samples=[
            (step, *sample_texts(tokens))
            for step, tokens in log.samples()[:-6:-1]
            if all(0 <= token < tokenizer.N_VOCAB for token in tokens)
        ],
    )


def page(key: str) -> tuple[Path, str]:
    """Return the file for the page of a run of this project, and its content.

    Args:
        key: The first letters of the run's key.

    Raises:
        UserError: No run, or more than one, has such a key.
    """
    runs = find_runs(Store.open(Machine.load()))
    run = choose(runs, key)
    body = render_body(run, [run])
    title = f"Run {run.key[:12]}"
    return Path(f"artifacts/run-{run.key[:12]}.html"), html.render(
        "watch.html", title=title, nonce=None, body=body
    )


def tiles(run: Found, log: Log, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (value, label) of the figures of the newest log lines."""

    def last(name: str) -> Any:
        values = log.curve(name)[1]
        return values[-1] if values else None

    steps, speed = _steps(record), last("tokens_per_second")
    done = log.records[-1]["step"] if log.records else 0
    found = [(f"{done:,}", f"of {steps:,} steps" if steps else "steps")]
    for name, label in (
        ("train/loss", "training loss, nats per token"),
        ("val/loss", "validation loss, nats per token"),
    ):
        if (value := last(name)) is not None:
            found.append((f"{value:.4f}", label))
    if speed:
        found.append((html.number(round(speed)), "tokens per second"))
    if (left := seconds_left(log, record)) is not None and run.state == "running":
        found.append((html.duration(left), "left, without validations"))
    if (seconds := last("seconds")) is not None:
        found.append((html.duration(seconds), "training time"))
    return found


def seconds_left(log: Log, record: dict[str, Any]) -> float | None:
    """Seconds of training left at the speed of the newest log line; None: not known."""
    done, speeds = log.curve("tokens")[1], log.curve("tokens_per_second")[1]
    try:
        model = ModelParams.model_validate(record["model"])
        params = TrainParams.model_validate({**record["train"], "val_tokens": 1})
        total = params.batches(model.block_size)(params.steps)[0] * model.block_size
        return max(0.0, (total - done[-1]) / speeds[-1])
    except (LookupError, ArithmeticError, ValueError, TypeError, UserError):  # of another version
        return None


def _steps(record: dict[str, Any]) -> int | None:
    """Steps of a run; None: not known."""
    match record:
        case {"train": {"steps": int(steps)}}:
            return steps
    return None


def _share(log: Log, steps: int | None) -> float:
    """Percent of the steps that are done."""
    return 100 * log.records[-1]["step"] / steps if log.records and steps else 0


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _model(record: dict[str, Any]) -> tuple[str, str]:
    """Title and sizes of the model."""
    try:
        config = ModelParams.model_validate(record["model"]).config()
    except (KeyError, ValueError, TypeError):  # damaged, or of another version
        return "A run whose run.json this version cannot read", ""
    sizes = (
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context of "
        f"{config.block_size} tokens."
    )
    return f"GPT-2 with {parameter_count(config):,} parameters", sizes


def _read(path: Path) -> dict[str, Any]:
    """Read a sealed file; empty if it is missing or damaged."""
    try:
        return atomic.read_sealed(path)
    except (OSError, ValueError):
        return {}


def _last_start(folder: Path) -> dict[str, Any]:
    """When, where and after which step the run was started last; empty: not known."""
    try:
        start = atomic.parse_json(atomic.read_bytes(folder / "starts.jsonl").splitlines()[-1])
        return {
            "time": _minute(datetime.fromisoformat(start["time"])),
            "host": start["host"],
            "device": start["device_name"],
            "processes": int(start["arithmetic"]["world_size"]),
            "step": int(start["step"]),
        }
    except (OSError, LookupError, ArithmeticError, ValueError, TypeError):
        return {}
