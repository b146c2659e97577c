"""Explain the selection to people: `--why FILE ROW` and `--sample RULE N` of `pipeline.curate`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.curate import heuristics, row_rules, words
from pipeline.curate.copies import NEAR
from pipeline.curate.examples import CHARACTERS, read_text
from pipeline.curate.pieces import Pieces
from pipeline.format.manifest import NAME, RawManifest
from pipeline.format.selection import Selection, read_ledger
from pipeline.params import CurateParams
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import nearest

_AGAIN = "run `dvc repro --force curate`"


def why(raw: Path, selection: Selection, source: RawManifest, path: str, row: int) -> Iterator[str]:
    """Explain what happened to a row: its rule, its twin, and its value under each heuristic.

    Raises:
        UserError: There is no such file or row.
    """
    files = {file.path: index for index, file in enumerate(source.files)}
    if path not in files:
        raise UserError(f"--why {path}: not a file of data/raw; {nearest(path, list(files))}")
    index = files[path]
    file, params = selection.manifest.files[index], params_of(selection)
    if not 0 <= row < file.rows:
        raise UserError(f"--why {path} {row}: no such row; use 0 to {file.rows - 1}")
    yield f"{printable(path)}, row {row:,}"
    ledger = read_ledger(selection.folder, file)
    entries = ledger.filter(pc.equal(ledger["row"], row)).to_pylist()
    yield f"dropped by {_decision(entries[0])}" if entries else "kept"
    yield from _values(read_text(raw, source, path, row), params)
    yield _excerpt(raw, source, path, row)
    for twin in _twin(source, *entries):
        yield f"its twin, which is kept: {_place(*twin)}"
        yield _excerpt(raw, source, *twin)


def params_of(selection: Selection) -> CurateParams:
    """Return the parameters of a selection.

    Raises:
        UserError: Another version of the code made it.
    """
    try:
        return CurateParams.model_validate(selection.manifest.params)
    except ValidationError:
        raise UserError(
            f"{selection.folder / NAME}: params: made by another version; {_AGAIN}"
        ) from None


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
            raise UserError(f"--sample: the store lacks what was measured; {_AGAIN}")
    limits, values = _comparison(pieces, params_of(selection), rule)
    dropped = _dropped(selection, rule, limits, count)
    kept = _narrowly_kept(pieces, selection, values, limits, count) if values else []
    shown = "".join(f", threshold {limit:g}" for limit in limits)
    yield f"{printable(rule)}: {manifest.dropped[rule]:,} rows dropped{shown}"
    for entry, narrow in zip_longest(dropped, kept):
        if entry is not None:
            yield f"\n== dropped: {_place(*entry['at'])}, {_decision(entry)}"
            yield _excerpt(raw, source, *entry["at"])
            for twin in _twin(source, entry):
                yield f"== its twin: {_place(*twin)}"
                yield _excerpt(raw, source, *twin)
        if narrow is not None:
            value, at = narrow
            yield f"\n== narrowly kept: {_place(*at)}, {value:.6g}"
            yield _excerpt(raw, source, *at)


Values = Callable[[int], np.ndarray]
"""Takes the number of a chunk; returns what a rule compares of its rows: (rows,) float64."""


def _comparison(
    pieces: Pieces, params: CurateParams, rule: str
) -> tuple[list[float], Values | None]:
    """Return a rule's thresholds, and the values that it compares, where these exist.

    Similarities are stored of dropped rows only.
    """
    if rule == NEAR:
        return ([params.similarity] if params.compare else []), None
    heuristic = {entry.name: entry for entry in row_rules.thresholds(params)[0]}.get(rule)
    if heuristic:
        return [heuristic.value], lambda i: heuristics.values(pieces.counts(i), heuristic.rule)
    ranges = {row_rules.column_name(entry): entry for entry in params.columns if entry.in_ is None}
    if column := ranges.get(rule):
        limits = [limit for limit in (column.min, column.max) if limit is not None]
        return limits, lambda i: row_rules.as_floats(pieces.column(i, column.column))
    return [], None


def _distances(values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Return how far values are from the nearest limit: (k,) float64; NaN: Inf; no limit: 0."""
    if not limits:
        return np.zeros(len(values))
    distances: np.ndarray = np.min([np.abs(values - limit) for limit in limits], axis=0)
    distances[np.isnan(distances)] = np.inf
    return distances


def _dropped(
    selection: Selection, rule: str, limits: Sequence[float], count: int
) -> list[dict[str, Any]]:
    """Return the rows that a rule dropped nearest to its limits; each with its place as `at`."""
    found: list[dict[str, Any]] = []
    for file in selection.manifest.files:
        ledger = read_ledger(selection.folder, file)
        entries = ledger.filter(pc.equal(ledger["rule"], rule))
        distances = _distances(entries["value"].to_numpy(), limits)
        nearest_rows = np.argsort(distances, kind="stable")[:count]
        for distance, entry in zip(
            distances[nearest_rows].tolist(),
            entries.take(pa.array(nearest_rows)).to_pylist(),
            strict=True,
        ):
            found.append({**entry, "at": (file.path, entry["row"]), "distance": distance})
        found = sorted(found, key=lambda entry: entry["distance"])[:count]
    return found


def _narrowly_kept(
    pieces: Pieces, selection: Selection, values: Values, limits: Sequence[float], count: int
) -> list[tuple[float, tuple[str, int]]]:
    """Return the kept rows whose values are nearest to a limit, with the values."""
    found: list[tuple[float, float, tuple[str, int]]] = []
    indices = {file.path: index for index, file in enumerate(selection.manifest.files)}
    for number, chunk in enumerate(pieces.chunks):
        of_chunk, kept = values(number), selection.kept(indices[chunk.file.path])
        if kept is not None:
            of_chunk = np.where(kept[chunk.start : chunk.stop], of_chunk, np.nan)
        distances = _distances(of_chunk, limits)
        for row in np.argsort(distances, kind="stable")[:count].tolist():
            if np.isfinite(distances[row]):
                at = (chunk.file.path, chunk.start + row)
                found.append((float(distances[row]), float(of_chunk[row]), at))
        found = sorted(found)[:count]
    return [(value, at) for _, value, at in found]


def _twin(source: RawManifest, entry: dict[str, Any] | None = None) -> list[tuple[str, int]]:
    """Return the file and row that is kept in place of a dropped one, if there is any."""
    if entry is None or entry["twin_file"] is None:
        return []
    return [(source.files[entry["twin_file"]].path, entry["twin_row"])]


def _place(path: str, row: int) -> str:
    return f"{printable(path)}, row {row:,}"


def _decision(entry: dict[str, Any]) -> str:
    """Describe an entry of a ledger: the rule, and what decided."""
    shown = [f"{entry['value']:.6g}"] if entry["value"] is not None else []
    shown += [entry["reason"]] if entry["reason"] is not None else []
    return printable(f"{entry['rule']} ({', '.join(shown)})" if shown else entry["rule"])


def _excerpt(raw: Path, source: RawManifest, path: str, row: int) -> str:
    """Return the beginning of a row's text, without control characters."""
    text = read_text(raw, source, path, row)
    lines = [f"    {printable(line)}" for line in text[:CHARACTERS].splitlines()]
    rest = len(text) - CHARACTERS
    return "\n".join([*lines, f"    [{rest:,} more characters]"] if rest > 0 else lines)
