"""Files of a piece, written batch by batch: a chunk's rows need not be in memory at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_GROUP_ROWS = 1 << 16


class RowsFile:
    """A `.npy` file of known shape."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self._file = open(path, "wb")
        self._dtype = np.dtype(dtype)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._left = int(np.prod(shape))

    def append(self, values: np.ndarray) -> None:
        """Write the next values, in C order."""
        self._left -= values.size
        np.ascontiguousarray(values, self._dtype).tofile(self._file)

    def __enter__(self) -> "RowsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._file.close()
        if kind is None and self._left:
            raise RuntimeError(f"{self._file.name}: {self._left} values missing")


class TableFile:
    """A parquet file, whose columns are those of its first rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def append(self, columns: Mapping[str, Any]) -> None:
        """Write the next rows: name -> (rows,) values."""
        self._waiting.append(pa.RecordBatch.from_pydict(dict(columns)))
        if sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
            self._writer.write_table(table)
            self._waiting = []

    def __enter__(self) -> "TableFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
