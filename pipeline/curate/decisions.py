"""What the rules have decided so far: the rows that are kept, and why each other one is not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipeline.format.selection import LEDGER_SCHEMA

# Over all files the strings may be longer than the 2 GiB of `pa.string`.
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("rule", pa.int32()),
        ("value", pa.float64()),
        ("reason", pa.large_string()),
        ("twin", pa.int64()),
    ]
)


@dataclass
class Decisions:
    """The decisions on the rows of the whole source, which are numbered over all files."""

    kept: np.ndarray
    """(n,) bool."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows dropped by each rule that was applied, in the order of application."""
    _dropped: list[pa.Table] = field(default_factory=list)

    def drop(
        self,
        rule: str,
        rows: np.ndarray,
        values: np.ndarray | None = None,
        reasons: pa.Array | None = None,
        twins: np.ndarray | None = None,
    ) -> None:
        """Drop rows that are still kept.

        Args:
            rows: (k,) int64.
            values: (k,) float64, what decided; non-finite values are stored as null.
            reasons: (k,) strings that decided: a value of a column, the name of a task.
            twins: (k,) int64, the kept row of which each one is a copy.
        """
        self.counts[rule] = self.counts.get(rule, 0) + len(rows)
        self.kept[rows] = False
        if not len(rows):
            return
        empty = pa.nulls(len(rows))
        columns = {
            "row": rows,
            "rule": np.full(len(rows), list(self.counts).index(rule)),
            "value": empty if values is None else pa.array(values, mask=~np.isfinite(values)),
            "reason": empty if reasons is None else reasons.cast(pa.large_string()),
            "twin": empty if twins is None else twins,
        }
        self._dropped.append(pa.table(columns).cast(_SCHEMA))

    def ledger(self) -> pa.Table:
        """Return all dropped rows in order: row, rule, value, reason, twin.

        The rule is an index into the keys of `counts`.
        """
        table = pa.concat_tables([_SCHEMA.empty_table(), *self._dropped]).combine_chunks()
        table = table.take(pa.array(np.argsort(table["row"].to_numpy())))
        rows, twins = table["row"].to_numpy(), table["twin"].fill_null(-1).to_numpy().copy()
        # The first of equal rows may be near another one: then that one is the twin of all.
        while len(again := np.flatnonzero((twins >= 0) & ~self.kept[twins])):
            twins[again] = twins[np.searchsorted(rows, twins[again])]
        return table.set_column(4, "twin", pa.array(twins, pa.int64(), mask=twins < 0))


def split_ledger(ledger: pa.Table, rules: Sequence[str], rows: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the part of each file of `Decisions.ledger`, in `LEDGER_SCHEMA`.

    Args:
        rules: The names of the rules.
        rows: The number of rows of each file.
    """
    names = pa.array(rules, pa.string())
    starts = np.cumsum([0, *rows])
    borders = np.searchsorted(ledger["row"].to_numpy(), starts)
    for start, (first, last) in zip(starts, pairwise(borders.tolist()), strict=False):
        # A copy: the offsets of a slice's strings may be beyond 2 GiB.
        part = ledger.take(pa.array(np.arange(first, last)))
        twins = part["twin"].fill_null(-1).to_numpy()
        files = np.searchsorted(starts, twins, side="right") - 1
        yield pa.table(
            {
                "row": part["row"].to_numpy() - start,
                "rule": names.take(part["rule"].combine_chunks()),
                "value": part["value"],
                "reason": part["reason"],
                "twin_file": pa.array(files, pa.int32(), mask=twins < 0),
                "twin_row": pa.array(twins - starts[files], pa.int64(), mask=twins < 0),
            },
            schema=LEDGER_SCHEMA,
        )
