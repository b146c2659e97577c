"""A few dropped rows of each rule, and how their texts begin: for people, in the manifest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.format.manifest import DroppedExample, RawManifest
from pipeline.format.parquet import read_batches

PER_RULE = 3
CHARACTERS = 600
"""Shown of a text."""


def examples(
    ledger: pa.Table, rules: Sequence[str], source: RawManifest, raw: Path
) -> dict[str, list[DroppedExample]]:
    """Return examples of each rule, spread over the rows that it dropped.

    Args:
        ledger: `Decisions.ledger`.
        rules: The names of the rules.
    """
    found: dict[str, list[DroppedExample]] = {}
    numbers = ledger["rule"].to_numpy()
    for number, rule in enumerate(rules):
        rows = np.flatnonzero(numbers == number)
        if not len(rows):
            continue
        chosen = np.unique(np.linspace(0, len(rows) - 1, PER_RULE).astype(int))
        entries = ledger.take(pa.array(rows[chosen])).to_pylist()
        found[rule] = [_example(entry, source, raw) for entry in entries]
    return found


def _example(entry: dict[str, Any], source: RawManifest, raw: Path) -> DroppedExample:
    path, row = locate(source, entry["row"])
    twin: dict[str, Any] = {}
    if entry["twin"] is not None:
        twin_path, twin_row = locate(source, entry["twin"])
        text = read_text(raw, source, twin_path, twin_row)[:CHARACTERS]
        twin = {"twin_path": twin_path, "twin_row": twin_row, "twin_text": text}
    text = read_text(raw, source, path, row)[:CHARACTERS]
    facts = {"value": entry["value"], "reason": entry["reason"]}
    return DroppedExample(path=path, row=row, text=text, **facts, **twin)


def locate(source: RawManifest, row: int) -> tuple[str, int]:
    """Return the file, and the row in it, of a row of all sources."""
    for file in source.files:
        if row < file.rows:
            return file.path, row
        row -= file.rows
    raise IndexError(row)


def read_text(raw: Path, source: RawManifest, path: str, row: int) -> str:
    """Read a row's text; empty if it is null.

    Raises:
        UserError: The file is missing or damaged.
    """
    column = next(source.column(file) for file in source.files if file.path == path)
    for _, texts in read_batches(raw / path, column, row, row + 1):
        return (texts[0].as_py() or b"").decode(errors="replace")
    return ""
