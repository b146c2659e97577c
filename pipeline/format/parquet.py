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

# Without a buffer size pyarrow buffers a whole column chunk and pre-buffers whole row groups.
_BUFFER_BYTES = 1 << 20
# Text per encoded batch: each call of the fast engine has about a millisecond of overhead.
_BATCH_BYTES = 1 << 22
# pyarrow limits a read by rows, not bytes: 16 documents of 10 MB take 160 MB.
_READ_ROWS = 16


def check_text_column(path: Path, name: str, column: str) -> int:
    """Check in the footer that a source file can be tokenized, and return its number of rows.

    Raises:
        UserError: The footer is unreadable, there are no rows, or no such column of strings.
    """
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: not readable as parquet ({reason}); remove the file from the source"
        ) from None
    fix = f"set source.text_column to one of its columns: {', '.join(schema.names)}"
    if column not in schema.names:
        raise UserError(f"{name}: no column {column!r}; {fix}")
    kind = schema.field(column).type
    # Binary columns are read as UTF-8; `tokenize` skips and counts documents that are not.
    if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        raise UserError(f"{name}: column {column!r} holds {kind}, not strings; {fix}")
    if not metadata.num_rows:
        raise UserError(f"{name}: no rows; remove the file from the source")
    return int(metadata.num_rows)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file for reading in bounded memory.

    Raises:
        UserError: The file is missing or has no readable footer.
    """
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to create it") from None
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as parquet ({reason}); remove it") from None


def row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """Return the rows and the uncompressed bytes of ``column`` per row group, from the footer.

    Raises:
        UserError: The column is missing.
    """
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(
                f"{path}: no column {column!r}; set source.text_column to one of its columns: "
                f"{', '.join(names)}"
            )
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        return [(group.num_rows, _column_bytes(group, column)) for group in groups]


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    # A leaf is named by its path: "text", or "meta.text" inside a struct.
    return next(int(c.total_uncompressed_size) for c in columns if c.path_in_schema == column)


def read_texts(
    path: Path, column: str, start: int, stop: int
) -> Iterator[tuple[int, list[str | None]]]:
    """Read like `read_batches`, but yield Python strings: for a few documents."""
    for row, texts in read_batches(path, column, start, stop):
        yield row, texts.to_pylist()


def read_batches(
    path: Path, column: str, start: int, stop: int, batch_bytes: int = _BATCH_BYTES
) -> Iterator[tuple[int, pa.Array]]:
    """Read rows [start, stop) of a text column in batches.

    pyarrow cannot seek inside a row group: rows of the group before ``start`` are decoded and
    dropped.

    Args:
        batch_bytes: Approximate bytes per batch; a larger row is a batch of its own.

    Yields:
        The number of the batch's first row in the file, and the batch's texts.
    """
    pending: list[pa.Array] = []
    first, size = start, 0
    for texts in _read_rows(path, column, start, stop, batch_bytes):
        for part in _split_large(texts, batch_bytes):
            # Do not copy a large part to concatenate it with others.
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
        wanted_rows, wanted_bytes = 0, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            if row < stop and row + group.num_rows > start:
                first_row = first_row if wanted else row
                wanted.append(index)
                wanted_rows += group.num_rows
                wanted_bytes += _column_bytes(group, column)
            row += group.num_rows
        if not wanted:
            return
        row = first_row
        batches = file.iter_batches(
            batch_size=max(1, min(_READ_ROWS, batch_bytes * wanted_rows // wanted_bytes)),
            row_groups=wanted,
            columns=[column],
            use_threads=False,
        )
        for batch in batches:
            if batch.nbytes > batch_bytes:
                # Arrow returns freed memory late. A column of large documents may be a single page
                # of 200 MB, which would stay allocated while others are encoded.
                pa.default_memory_pool().release_unused()
            low, high = max(start - row, 0), min(stop - row, batch.num_rows)
            if low < high:
                yield batch.column(0).slice(low, high - low)
            row += batch.num_rows
            if row >= stop:
                return


def _split_large(texts: pa.Array, batch_bytes: int) -> Iterator[pa.Array]:
    """Yield the texts in parts of at most two batches, or of one row."""
    if texts.nbytes <= 2 * batch_bytes or len(texts) <= 1:
        yield texts
        return
    middle = len(texts) // 2
    yield from _split_large(texts[:middle], batch_bytes)
    yield from _split_large(texts[middle:], batch_bytes)
