"""Benchmark tasks from a local file of JSON lines, or from the Hugging Face Hub on request."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress
from typing import Any, TypeVar

from pipeline.format.manifest import NAME, SelectionManifest
from pipeline.format.selection import SELECTION
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import find_file
from pipeline.store import atomic

T = TypeVar("T")

FROM_HUB = "hub"

Row = Mapping[str, Any]


def read_tasks(
    name: str, source: str, hub: tuple[str, str | None, str], parse: Callable[[Row], T]
) -> list[T]:
    """Read the tasks of a benchmark, in the order of their source.

    Args:
        name: Parameter that sets the source, such as ``evaluate.lambada``, for messages.
        source: "hub", or the path of a .jsonl file.
        hub: Repository, configuration and split on the Hub, for source "hub".
        parse: Builds a task from a row; may raise KeyError, TypeError or ValueError.

    Raises:
        UserError: The source cannot be read, or a row is not a task; names the row.
    """
    key = f"params.yaml: {name}: {source}"
    rows = _read_hub(key, *hub) if source == FROM_HUB else _read_file(key, source)
    tasks = []
    for number, row in enumerate(rows, 1):
        try:
            tasks.append(parse(row))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{key}: row {number} is not a task ({reason}); use another file"
            ) from None
    if not tasks:
        raise UserError(f"{key}: has no tasks; use another file")
    return tasks


def text(row: Row, key: str) -> str:
    """Return a text of a row.

    Raises:
        KeyError, TypeError: There is none.
    """
    if not isinstance(value := row[key], str):
        raise TypeError(f"{key} is no text: {reprlib.repr(value)}")
    return value


def are_clean(source: str | None, n: int) -> list[bool] | None:
    """Return which tasks of a file share no words with a document that `curate` keeps.

    Args:
        source: As of `read_tasks`; None: no benchmark.
        n: Number of tasks.

    Returns:
        None if `curate.decontaminate` does not name the file.

    Raises:
        UserError: The file has changed since.
    """
    if source is None or not (SELECTION / NAME).exists():
        return None
    selection = SelectionManifest.load(SELECTION)
    if source not in selection.task_files:
        return None
    if atomic.sha256_file(find_file(source)) != selection.task_files[source]:
        raise UserError(
            f"{SELECTION / NAME}: {source} has changed since its tasks were looked for; run "
            "`dvc repro --force curate`"
        )
    return [f"{source}/{line}" not in selection.unclean_tasks for line in range(n)]


def with_clean(
    metrics: Callable[[list[T]], dict[str, float]], results: list[T], clean: list[bool] | None
) -> dict[str, float]:
    """Return the metrics of all tasks and, as ``NAME_clean_...``, those of the clean ones.

    Args:
        metrics: Computes metrics, whose names begin with that of the benchmark, from results.
        results: Per task.
        clean: `are_clean`.
    """
    found = metrics(results)
    if clean is not None and any(clean):
        of_clean = metrics([*compress(results, clean)])
        found |= {name.replace("_", "_clean_", 1): value for name, value in of_clean.items()}
    return found


def _read_file(key: str, source: str) -> Iterator[Row]:
    try:
        atomic.check_regular(path := find_file(source))
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = atomic.parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError(line[:40])
                yield row
    except OSError as error:
        raise UserError(f"{key}: {error.strerror}; name a .jsonl file, hub, or null") from None
    except ValueError as error:
        raise UserError(f"{key}: not JSON lines ({error}); use another file") from None


def _read_hub(key: str, repo: str, config: str | None, split: str) -> Iterable[Row]:
    from datasets import load_dataset  # takes a second to import

    try:
        rows: Iterable[Row] = load_dataset(repo, config, split=split)
    except Exception as error:  # the client's errors have no common base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {repo} cannot be downloaded ({type(error).__name__}: {reason}); "
            "name a .jsonl file, or null"
        ) from None
    return rows
