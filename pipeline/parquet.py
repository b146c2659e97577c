"""Parquet in FineWeb's schema: footers for planning, and text read in bounded batches."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

# The nine columns of HuggingFaceFW/fineweb (its dataset card).
FINEWEB_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
    ]
)

# Without a buffer size pyarrow holds a whole column chunk, and pre-buffers whole row groups.
_BUFFER_BYTES = 1 << 20
_BATCH_ROWS = 256


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file for reading in bounded memory.

    Raises:
        UserError: the file is missing or has no readable footer.
    """
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `dvc repro` makes it") from None
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as parquet ({reason}); remove it") from None


def row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of ``column``, per row group, from the footer alone.

    Raises:
        UserError: the column is missing.
    """
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names)}")
        metadata = file.metadata
        groups = []
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            columns = (group.column(i) for i in range(group.num_columns))
            # A leaf is named by its path: "text", or "meta.text" inside a struct.
            size = next(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
            groups.append((group.num_rows, size))
        return groups


def read_texts(
    path: Path, column: str, start: int, stop: int, batch_rows: int = _BATCH_ROWS
) -> Iterator[tuple[int, list[str | None]]]:
    """`read_batches`, its texts as Python strings: for a few documents."""
    for row, texts in read_batches(path, column, start, stop, batch_rows):
        yield row, texts.to_pylist()


def read_batches(
    path: Path, column: str, start: int, stop: int, batch_rows: int = _BATCH_ROWS
) -> Iterator[tuple[int, pa.Array]]:
    """Read rows ``start`` to ``stop`` of a text column, a batch at a time.

    pyarrow cannot seek inside a row group, so rows before ``start`` in its group are decoded and
    dropped.

    Yields:
        The number of the batch's first row in the file, and its texts as Arrow has them.
    """
    with open_parquet(path) as file:
        metadata = file.metadata
        wanted, row, first_row = [], 0, None
        for index in range(metadata.num_row_groups):
            rows = metadata.row_group(index).num_rows
            if row < stop and row + rows > start:
                wanted.append(index)
                first_row = row if first_row is None else first_row
            row += rows
        if first_row is None:
            return
        row = first_row
        batches = file.iter_batches(
            batch_size=batch_rows, row_groups=wanted, columns=[column], use_threads=False
        )
        for batch in batches:
            low, high = max(start - row, 0), min(stop - row, batch.num_rows)
            if low < high:
                yield row + low, batch.column(0).slice(low, high - low)
            row += batch.num_rows
            if row >= stop:
                return
