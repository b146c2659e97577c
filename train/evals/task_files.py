"""The tasks of a benchmark: from a file of your own, or from the hub where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import project_root

T = TypeVar("T")

FROM_HUB = "hub"

RawRow = Mapping[str, Any]


def read_tasks(
    name: str, source: str, hub: tuple[str, str | None, str], make: Callable[[RawRow], T]
) -> list[T]:
    """The tasks of a benchmark, in the order of their source.

    Args:
        name: Of the parameter that asks, such as ``evaluate.lambada``.
        source: "hub", or the path of a file of JSON lines.
        hub: Repository, configuration and split, fetched by `datasets` for source "hub" alone.
        make: A task of a row; may raise KeyError, TypeError or ValueError.

    Raises:
        UserError: The source cannot be had, or holds something else; names the row.
    """
    key = f"params.yaml: {name}: {source}"
    rows = _fetch(key, *hub) if source == FROM_HUB else _read(key, source)
    tasks = []
    for number, row in enumerate(rows, 1):
        try:
            tasks.append(make(row))
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{key}: row {number} is no task ({what}); take another file") from None
    if not tasks:
        raise UserError(f"{key}: holds no tasks; take another file")
    return tasks


def located(path: str) -> Path:
    """A file that a parameter names: here, or in the project's main checkout.

    Experiments run in folders of their own, where files that git ignores are absent.
    """
    here = Path(path)
    return here if here.exists() else project_root() / here


def _read(key: str, source: str) -> Iterator[RawRow]:
    try:
        with open(located(source), encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(line[:40])
                yield row
    except OSError as error:
        raise UserError(f"{key}: {error.strerror}; name a .jsonl file, hub, or null") from None
    except ValueError as error:
        raise UserError(f"{key}: not JSON lines ({error}); take another file") from None


def _fetch(key: str, repo: str, config: str | None, split: str) -> Iterable[RawRow]:
    from datasets import load_dataset  # here: a second that nobody else needs to spend

    try:
        rows: Iterable[RawRow] = load_dataset(repo, config, split=split)
    except Exception as error:  # whatever the hub's client and its many layers end with
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {repo} cannot be had ({type(error).__name__}: {reason}); "
            "name a .jsonl file, or null"
        ) from None
    return rows
