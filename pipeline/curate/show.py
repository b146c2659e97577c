"""Explain the selection to people: `--why FILE ROW` and `--sample RULE N` of `pipeline.curate`."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate import heuristics, row_rules, words
from pipeline.curate.copies import NEAR
from pipeline.curate.examples import read_text
from pipeline.curate.pieces import Pieces
from pipeline.format.manifest import RawManifest
from pipeline.format.selection import Selection, read_ledger
from pipeline.params import CurateParams
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import nearest

_CHARACTERS = 600


def why(raw: Path, selection: Selection, source: RawManifest, path: str, row: int) -> Iterator[str]:
    """Explain what happened to a row: its rule, its twin, and its value under each heuristic.

    Raises:
        UserError: There is no such file or row.
    """
    files = {file.path: index for index, file in enumerate(source.files)}
    if path not in files:
        raise UserError(f"--why {path}: not a file of data/raw; {nearest(path, list(files))}")
    index = files[path]
    file, params = selection.manifest.files[index], _params(selection)
    if not 0 <= row < file.rows:
        raise UserError(f"--why {path} {row}: no such row; use 0 to {file.rows - 1}")
    yield f"{printable(path)}, row {row:,}"
    ledger = read_ledger(selection.folder, file)
    entry = ledger.filter(pc.equal(ledger["row"], row)).to_pylist()
    if not entry:
        yield "kept"
    else:
        yield f"dropped by {_decision(entry[0])}"
    yield from _values(read_text(raw, source, path, row), params)
    yield _excerpt(raw, source, path, row)
    if entry and entry[0]["twin_file"] is not None:
        twin, twin_row = source.files[entry[0]["twin_file"]].path, entry[0]["twin_row"]
        yield f"its twin, which is kept: {printable(twin)}, row {twin_row:,}"
        yield _excerpt(raw, source, twin, twin_row)


def _params(selection: Selection) -> CurateParams:
    return CurateParams.model_validate(selection.manifest.params)


def _values(text: str, params: CurateParams) -> Iterator[str]:
    """Yield the value of a text under each heuristic that is applied, beside its threshold."""
    rules, limits = row_rules.thresholds(params)
    if not rules:
        return
    texts = words.as_texts(pa.array([text.encode()], pa.large_binary()))
    counts = heuristics.measure(texts, {rule.set for rule in rules}, limits)
    for rule in rules:
        value = heuristics.values(counts, rule.rule)[0]
        verdict = "  <- dropped" if heuristics.dropped(counts, rule.rule, rule.value)[0] else ""
        yield f"  {rule.name:45} {value:10.4g}  {rule.rule.limit} {rule.value:g}{verdict}"


def sample(
    raw: Path, selection: Selection, source: RawManifest, pieces: Pieces, rule: str, count: int
) -> Iterator[str]:
    """Show rows that a rule dropped, each beside a row that it narrowly kept, or its twin.

    The dropped rows nearest to the threshold come first.

    Raises:
        UserError: No such rule was applied.
    """
    manifest = selection.manifest
    if rule not in manifest.dropped:
        known = list(manifest.dropped)
        hint = nearest(rule, known) if known else "curate has no rules; set them in params.yaml"
        raise UserError(f"--sample {rule}: no rule of this selection; {hint}")
    for kind, key in pieces.named():
        if pieces.store.find(kind, key) is None:
            raise UserError("--sample: the store lacks what was measured; run `dvc repro curate`")
    params = _params(selection)
    threshold = _threshold(params, rule)
    dropped = _dropped(selection, rule)
    if threshold is not None:
        dropped.sort(key=lambda entry: abs((entry["value"] or 0) - threshold))
    kept = _narrowly_kept(pieces, selection, params, rule, threshold, count)
    limit = "" if threshold is None else f", threshold {threshold:g}"
    yield f"{printable(rule)}: {len(dropped):,} rows dropped{limit}"
    for entry, narrow in zip_longest(dropped[:count], kept):
        if entry is not None:
            yield f"\n== dropped: {_place(source, entry)}, {_decision(entry)}"
            yield _excerpt(raw, source, *entry["at"])
            if (twin := entry["twin_file"]) is not None:
                twin_path = source.files[twin].path
                yield f"== its twin: {printable(twin_path)}, row {entry['twin_row']:,}"
                yield _excerpt(raw, source, twin_path, entry["twin_row"])
        if narrow is not None:
            value, (path, row) = narrow
            yield f"\n== narrowly kept: {printable(path)}, row {row:,}, {value:.6g}"
            yield _excerpt(raw, source, path, row)


def _threshold(params: CurateParams, rule: str) -> float | None:
    """Return the number beyond which a rule drops a row; None if it compares no numbers."""
    if rule == NEAR:
        return params.similarity if params.compare else None
    for threshold in row_rules.thresholds(params)[0]:
        if threshold.name == rule:
            return threshold.value
    for column in params.columns:
        if row_rules.column_name(column) == rule:
            return column.min if column.min is not None else column.max
    return None


def _dropped(selection: Selection, rule: str) -> list[dict[str, Any]]:
    """Return the entries of a rule in all ledgers, each with its file and row as `at`."""
    found: list[dict[str, Any]] = []
    for file in selection.manifest.files:
        ledger = read_ledger(selection.folder, file)
        entries = ledger.filter(pc.equal(ledger["rule"], rule)).to_pylist()
        found += [{**entry, "at": (file.path, entry["row"])} for entry in entries]
    return found


def _narrowly_kept(
    pieces: Pieces,
    selection: Selection,
    params: CurateParams,
    rule: str,
    threshold: float | None,
    count: int,
) -> list[tuple[float, tuple[str, int]]]:
    """Return the kept rows whose values are nearest to a threshold, with the values."""
    found: list[tuple[float, float, tuple[str, int]]] = []
    for number, chunk in enumerate(pieces.chunks):
        values = _values_of_chunk(pieces, number, params, rule)
        if values is None or threshold is None:
            return []
        kept = selection.kept(chunk.file_index)
        if kept is not None:
            values = np.where(kept[chunk.start : chunk.stop], values, np.nan)
        distances = np.abs(values - threshold)
        for row in np.argsort(distances, kind="stable")[:count].tolist():
            if not np.isnan(distances[row]):
                at = (chunk.file.path, chunk.start + row)
                found.append((float(distances[row]), float(values[row]), at))
        found = sorted(found)[:count]
    return [(value, at) for _, value, at in found]


def _values_of_chunk(
    pieces: Pieces, number: int, params: CurateParams, rule: str
) -> np.ndarray | None:
    """Return the values that a rule compares with its threshold: (rows,) float64."""
    for threshold in row_rules.thresholds(params)[0]:
        if threshold.name == rule:
            return heuristics.values(pieces.counts(number), threshold.rule)
    for column in params.columns:
        if row_rules.column_name(column) == rule and column.in_ is None:
            return row_rules.as_floats(pieces.column(number, column.column))
    return None


def _place(source: RawManifest, entry: dict[str, Any]) -> str:
    path, row = entry["at"]
    return f"{printable(path)}, row {row:,}"


def _decision(entry: dict[str, Any]) -> str:
    """Describe an entry of a ledger: the rule, and what decided."""
    shown = [f"{entry['value']:.6g}"] if entry["value"] is not None else []
    shown += [entry["reason"]] if entry["reason"] is not None else []
    return printable(f"{entry['rule']} ({', '.join(shown)})" if shown else entry["rule"])


def _excerpt(raw: Path, source: RawManifest, path: str, row: int) -> str:
    """Return the beginning of a row's text, without control characters."""
    text = read_text(raw, source, path, row)
    lines = [f"    {printable(line)}" for line in text[:_CHARACTERS].splitlines()]
    rest = len(text) - _CHARACTERS
    return "\n".join([*lines, f"    [{rest:,} more characters]"] if rest > 0 else lines)
