"""What the rules have decided so far: the rows that are kept, and why each other one is not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.format.selection import LEDGER_SCHEMA

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("rule", pa.string()),
        ("value", pa.float64()),
        ("reason", pa.string()),
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
            values: (k,) float64, what decided; NaN: no number.
            reasons: (k,) strings: a value that is no number, the name of a task.
            twins: (k,) int64, the kept row of which each one is a copy.
        """
        self.counts[rule] = self.counts.get(rule, 0) + len(rows)
        self.kept[rows] = False
        if not len(rows):
            return
        empty = pa.nulls(len(rows))
        columns = {
            "row": rows,
            "rule": pa.repeat(pa.scalar(rule), len(rows)),
            "value": empty if values is None else pa.array(values, from_pandas=True),
            "reason": empty if reasons is None else reasons.cast(pa.string()),
            "twin": empty if twins is None else twins,
        }
        self._dropped.append(pa.table(columns).cast(_SCHEMA))

    def ledgers(self, rows: Sequence[int]) -> Iterator[pa.Table]:
        """Yield the ledger of each file, in `LEDGER_SCHEMA`.

        Args:
            rows: The number of rows of each file.
        """
        starts = np.cumsum([0, *rows])
        table = pa.concat_tables([_SCHEMA.empty_table(), *self._dropped]).sort_by("row")
        dropped, all_twins = table["row"].to_numpy(), table["twin"].fill_null(-1).to_numpy().copy()
        borders = np.searchsorted(dropped, starts)
        # The first of equal rows may be near another one: then that one is the twin of all.
        while len(again := np.flatnonzero((all_twins >= 0) & ~self.kept[all_twins])):
            all_twins[again] = all_twins[np.searchsorted(dropped, all_twins[again])]
        for index in range(len(rows)):
            part = table.slice(borders[index], borders[index + 1] - borders[index])
            twins = all_twins[borders[index] : borders[index + 1]]
            files = np.searchsorted(starts, twins, side="right") - 1
            is_copy = twins >= 0
            yield pa.table(
                {
                    "row": part["row"].to_numpy() - starts[index],
                    "rule": part["rule"],
                    "value": part["value"],
                    "reason": part["reason"],
                    "twin_file": pa.array(files, pa.int32(), mask=~is_copy),
                    "twin_row": pa.array(twins - starts[files], pa.int64(), mask=~is_copy),
                },
                schema=LEDGER_SCHEMA,
            )
