"""Parquet in FineWeb's schema: footers for planning, and text read in bounded batches."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.errors import UserError

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
# What is read and encoded in one go: a call of the fast engine takes a millisecond by itself.
_BATCH_BYTES = 1 << 22
# pyarrow reads by rows, whatever they hold: so many of 10 MB are 160 MB.
_READ_ROWS = 16


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
            groups.append((group.num_rows, column_bytes(group, column)))
        return groups


def column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """The uncompressed bytes of a column in a row group."""
    columns = (group.column(i) for i in range(group.num_columns))
    # A leaf is named by its path: "text", or "meta.text" inside a struct.
    return next(int(c.total_uncompressed_size) for c in columns if c.path_in_schema == column)


def read_texts(
    path: Path, column: str, start: int, stop: int
) -> Iterator[tuple[int, list[str | None]]]:
    """`read_batches`, its texts as Python strings: for a few documents."""
    for row, texts in read_batches(path, column, start, stop):
        yield row, texts.to_pylist()


def read_batches(
    path: Path, column: str, start: int, stop: int, batch_bytes: int = _BATCH_BYTES
) -> Iterator[tuple[int, pa.Array]]:
    """Read rows ``start`` to ``stop`` of a text column, a batch at a time.

    pyarrow cannot seek inside a row group, so rows before ``start`` in its group are decoded and
    dropped.

    Args:
        batch_bytes: bytes of a batch, about; a row that is larger is a batch of its own.

    Yields:
        The number of the batch's first row in the file, and its texts as Arrow has them.
    """
    pending: list[pa.Array] = []
    first, size = start, 0
    for texts in _read_rows(path, column, start, stop, batch_bytes):
        for part in _halved(texts, batch_bytes):
            # A large one is not copied together with others.
            if pending and size + part.nbytes > 2 * batch_bytes:
                yield first, pa.concat_arrays(pending)
                first, size, pending = first + sum(map(len, pending)), 0, []
            pending.append(part)
            size += part.nbytes
            if size >= batch_bytes:
                yield first, pa.concat_arrays(pending) if len(pending) > 1 else part
                first, size, pending = first + sum(map(len, pending)), 0, []
    if pending:
        yield first, pa.concat_arrays(pending)


def _read_rows(
    path: Path, column: str, start: int, stop: int, batch_bytes: int
) -> Iterator[pa.Array]:
    with open_parquet(path) as file:
        metadata = file.metadata
        wanted: list[int] = []
        row, first_row = 0, 0
        rows_of_wanted, bytes_of_wanted = 0, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            if row < stop and row + group.num_rows > start:
                first_row = first_row if wanted else row
                wanted.append(index)
                rows_of_wanted += group.num_rows
                bytes_of_wanted += column_bytes(group, column)
            row += group.num_rows
        if not wanted:
            return
        row = first_row
        batches = file.iter_batches(
            batch_size=max(1, min(_READ_ROWS, batch_bytes * rows_of_wanted // bytes_of_wanted)),
            row_groups=wanted,
            columns=[column],
            use_threads=False,
        )
        for batch in batches:
            if batch.nbytes > batch_bytes:
                # Arrow gives back late what it has freed. Of large documents one page may be the
                # whole column, 200 MB packed, and these would be held while others are encoded.
                pa.default_memory_pool().release_unused()
            low, high = max(start - row, 0), min(stop - row, batch.num_rows)
            if low < high:
                yield batch.column(0).slice(low, high - low)
            row += batch.num_rows
            if row >= stop:
                return


def _halved(texts: pa.Array, batch_bytes: int) -> Iterator[pa.Array]:
    """The texts in parts of two batches at most, or of one row."""
    if texts.nbytes <= 2 * batch_bytes or len(texts) <= 1:
        yield texts
        return
    middle = len(texts) // 2
    yield from _halved(texts[:middle], batch_bytes)
    yield from _halved(texts[middle:], batch_bytes)
