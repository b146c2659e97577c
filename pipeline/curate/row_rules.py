"""Rules that look at one row at a time: columns, heuristics, and words shared with a task."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate import heuristics
from pipeline.curate.decisions import Decisions
from pipeline.curate.decontaminate import Index
from pipeline.curate.heuristics import Limits, Rule
from pipeline.curate.pieces import Pieces
from pipeline.params import ColumnRule, CurateParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import nearest

CONTAMINATION = "contamination"
_LIMITS_OF = {"short_line": "fineweb", "line_words": "c4", "word_length": "c4"}
DUMP = "dump"
"""The column of the source that `scope: dump` reads."""


@dataclass(frozen=True)
class Threshold:
    """A rule of a set, with the threshold that applies."""

    set: str
    rule: Rule
    value: float

    @property
    def name(self) -> str:
        """Set and rule: `gopher_quality.min_words`."""
        return f"{self.set}.{self.rule.name}"


def thresholds(params: CurateParams) -> tuple[list[Threshold], Limits]:
    """Return the heuristics to apply, in order, and the limits that decide the measures.

    Raises:
        UserError: A key of `curate.filters` is unknown.
    """
    found, limits = [], Limits()._asdict()
    for name, rules in heuristics.SETS.items():
        if name not in params.filters:
            continue
        changed = dict(params.filters[name])
        for rule in rules:
            value = changed.pop(rule.name, rule.threshold)
            if value is not None:
                found.append(Threshold(name, rule, value))
        of_set = [limit for limit in limits if _LIMITS_OF[limit] == name]
        for key in [key for key in changed if key in of_set]:
            value = changed.pop(key)
            if value is None or value < 0 or value != int(value):
                raise UserError(f"params.yaml: curate.filters.{name}.{key}: not a number from 0")
            limits[key] = int(value)
        for key in changed:
            hint = nearest(key, [*(rule.name for rule in rules), *of_set])
            raise UserError(f"params.yaml: curate.filters.{name}.{key}: unknown key; {hint}")
    return found, Limits(**limits)


def column_name(rule: ColumnRule) -> str:
    """Return a rule's name in the ledger."""
    return f"columns.{rule.column}"


def drop_by_columns(pieces: Pieces, rules: list[ColumnRule], decisions: Decisions) -> None:
    """Drop the rows whose values in columns the rules do not keep."""
    for rule in rules:
        name = column_name(rule)
        for number, span in pieces.spans():
            column = pieces.column(number, rule.column)
            rows = _rows(decisions, span, ~column_keeps(column, rule))
            local = pa.array(rows - span.start)
            if is_number(column.type):
                decisions.drop(name, rows, values=as_floats(column.take(local)))
            else:
                decisions.drop(name, rows, reasons=column.take(local))


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column of a piece holds numbers rather than strings."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def as_floats(column: pa.Array) -> np.ndarray:
    """Return the (rows,) float64 of a column of numbers; null: NaN."""
    floats: np.ndarray = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return floats


def column_keeps(column: pa.Array, rule: ColumnRule) -> np.ndarray:
    """Return which rows a rule keeps: (rows,) bool.

    Raises:
        UserError: The rule's values do not fit the type of the column.
    """
    if rule.in_ is not None:
        try:
            return np.asarray(pc.is_in(column, pa.array(rule.in_, column.type)))
        except (pa.ArrowException, ValueError, OverflowError):
            pass
    elif is_number(column.type):
        values = as_floats(column)
        low, high = (_rounded(limit, column.type) for limit in (rule.min, rule.max))
        return (values >= (-np.inf if low is None else low)) & (
            values <= (np.inf if high is None else high)
        )
    raise UserError(
        f"params.yaml: curate.columns: column {rule.column!r} holds {column.type}; use in with "
        "values of that type for strings, or min and max for numbers"
    )


def _rounded(limit: float | None, kind: pa.DataType) -> float | None:
    """Round a limit as the values of a column are: 0.65 in float32 is below 0.65."""
    if limit is None or not pa.types.is_floating(kind):
        return limit
    with np.errstate(over="ignore"):
        return float(kind.to_pandas_dtype()(limit))


def drop_by_heuristics(pieces: Pieces, rules: list[Threshold], decisions: Decisions) -> None:
    """Drop the rows that are beyond a threshold; a row's first such rule is recorded."""
    for number, span in pieces.spans() if rules else ():
        counts = pieces.counts(number)
        for rule in rules:
            rows = _rows(decisions, span, heuristics.dropped(counts, rule.rule, rule.value))
            values = heuristics.values(counts, rule.rule)[rows - span.start]
            decisions.drop(rule.name, rows, values=values)


def drop_contaminated(
    pieces: Pieces, tasks: Index, is_dropped: bool, decisions: Decisions
) -> dict[str, Any]:
    """Find, and drop if asked, the rows that share words with a task; return what was found."""
    rows_found, items = 0, Counter[int]()
    for number, span in pieces.spans():
        found = _found(pieces, number, span, decisions)
        items.update(found[:, 1].tolist())
        # Of several tasks in a row, the one with most n-grams: the ledger has a line per row.
        order = np.lexsort((found[:, 1], -found[:, 2], found[:, 0]))
        found = found[order]
        found = found[np.unique(found[:, 0], return_index=True)[1]]
        rows_found += len(found)
        if is_dropped:
            names = pa.array([tasks.items[item] for item in found[:, 1].tolist()], pa.string())
            decisions.drop(
                CONTAMINATION, found[:, 0] + span.start, found[:, 2].astype(float), names
            )
    return {
        "contaminated_rows": rows_found,
        "tasks": len(tasks.items) + len(tasks.short),
        "tasks_found": len(items),
        "tasks_too_short": len(tasks.short),
    }


def unclean_tasks(pieces: Pieces, tasks: Index, decisions: Decisions) -> dict[str, int | None]:
    """Return the tasks that share words with rows kept by all rules; see `SelectionManifest`."""
    rows = Counter[int]()
    for number, span in pieces.spans():
        rows.update(_found(pieces, number, span, decisions)[:, 1].tolist())
    return dict.fromkeys(tasks.short) | {
        tasks.items[item]: count for item, count in sorted(rows.items())
    }


def _found(pieces: Pieces, number: int, span: slice, decisions: Decisions) -> np.ndarray:
    """Return the words shared with tasks in the rows of a chunk that are kept so far: (f, 3)."""
    found = pieces.array(number, "contamination", "found.npy")
    kept: np.ndarray = found[decisions.kept[span][found[:, 0]]]
    return kept


def dumps(pieces: Pieces) -> tuple[np.ndarray, list[str]]:
    """Return the number of each row's dump, (n,) int32, and the dumps in order of appearance."""
    numbers: dict[str, int] = {}
    groups = np.empty(pieces.rows, np.int32)
    for number, span in pieces.spans():
        column = pieces.column(number, DUMP).cast(pa.string())
        encoded = column.fill_null("").dictionary_encode()
        found = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
        groups[span] = np.array(found, np.int32)[encoded.indices.to_numpy()]
    return groups, list(numbers)


def _rows(decisions: Decisions, span: slice, dropped: np.ndarray) -> np.ndarray:
    """Return the rows of a chunk, numbered in the source, that are kept so far and now dropped."""
    rows: np.ndarray = np.flatnonzero(dropped & decisions.kept[span]) + span.start
    return rows
