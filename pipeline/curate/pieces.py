"""The pieces of all chunks, read as if the source were one: row numbers run over all its files."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import Chunk


class Pieces:
    """The measured chunks of a source, in row order."""

    def __init__(
        self, store: Store, chunks: Sequence[Chunk], keys: Sequence[Mapping[str, str]]
    ) -> None:
        """Take chunks whose pieces are in the store.

        Args:
            keys: The keys of each chunk's pieces, by kind.
        """
        self.store, self.chunks, self.keys = store, chunks, keys
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        # Chunk i holds the source's rows [starts[i], starts[i + 1]).
        self.starts = np.cumsum([0, *sizes])

    @property
    def rows(self) -> int:
        """Rows of the source."""
        return int(self.starts[-1])

    def named(self) -> list[tuple[str, str]]:
        """Return kind and key of all pieces."""
        return [entry for keys in self.keys for entry in keys.items()]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield each chunk's number and its rows in the source."""
        for number in range(len(self.chunks)):
            yield number, slice(int(self.starts[number]), int(self.starts[number + 1]))

    def path(self, number: int, kind: str, name: str) -> Path:
        """Return the path of a file of a chunk's piece."""
        return self.store.path(kind, self.keys[number][kind]) / name

    def array(self, number: int, kind: str, name: str) -> np.ndarray:
        """Map a chunk's array into memory."""
        found: np.ndarray = np.load(self.path(number, kind, name), mmap_mode="r")
        return found

    def column(self, number: int, name: str) -> pa.Array:
        """Read a chunk's values of a column of the source."""
        path = self.path(number, "columns", "columns.parquet")
        return pq.read_table(path, columns=[name])[0].combine_chunks()

    def counts(self, number: int) -> dict[str, np.ndarray]:
        """Read a chunk's counts for the heuristics: (rows,) integers, by name."""
        table = pq.read_table(self.path(number, "measures", "measures.parquet"))
        return {name: table[name].to_numpy() for name in table.column_names}

    def gather(
        self, kind: str, name: str, rows: np.ndarray, out: Any, band: int | None = None
    ) -> Any:
        """Copy some rows of all chunks' arrays to ``out``, and return it.

        Args:
            rows: (k,) int64, ascending.
            out: (k, ...) array.
            band: Of arrays (bands, rows): the band to read.
        """
        borders = np.searchsorted(rows, self.starts)
        for number, (first, last) in enumerate(pairwise(borders.tolist())):
            if first < last:
                array = self.array(number, kind, name)
                local = rows[first:last] - self.starts[number]
                out[first:last] = (array if band is None else array[band])[local]
        return out
