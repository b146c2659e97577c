"""Parquet in FineWeb's schema: footers for planning, and text read in bounded batches."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.errors import UserError, printable

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

# A column without any value has the type null. Bytes are read as UTF-8; `tokenize` skips and counts
# documents that are not.
_TEXT_TYPES = (
    pa.string(), pa.large_string(), pa.string_view(),
    pa.binary(), pa.large_binary(), pa.binary_view(), pa.null(),
)  # fmt: skip
_LARGE_TYPES = (pa.large_string(), pa.large_binary())

# Without a buffer size pyarrow buffers a whole column chunk and pre-buffers whole row groups.
_BUFFER_BYTES = 1 << 20
# Text per encoded batch: each call of the fast engine has about a millisecond of overhead.
_BATCH_BYTES = 1 << 22
# pyarrow limits a read by rows, not bytes: 16 documents of 10 MB take 160 MB.
_READ_ROWS = 16
_METADATA_ROWS = 1 << 12
_NAMES_SHOWN = 20
_MESSAGE = 200  # characters of a text from a file or from pyarrow

_REPLACE = "replace the file, or list it in source.exclude"
_REBUILD = "run `GPT2_FRESH=1 dvc repro --force download` to fetch and check it again"


class NoTextColumn(UserError):
    """A file without the column `source.text_column`, or with another type of it."""


def is_text(kind: pa.DataType) -> bool:
    """Return whether an Arrow type holds strings or bytes, in any layout, or only nulls."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return kind in _TEXT_TYPES


def as_binary(texts: pa.Array) -> pa.Array:
    """Return the values of a type that `is_text` as large_binary."""
    storage = texts.storage if isinstance(texts, pa.ExtensionArray) else texts
    return storage.cast(pa.large_binary())


def check_text_column(path: Path, name: str, column: str) -> int:
    """Check in the footer that a source file can be tokenized, and return its number of rows.

    A file without rows needs no text column: pandas writes an empty one as numbers.

    Args:
        name: The file's name in the source.

    Raises:
        UserError: The footer is unreadable, or there is no such column of text.
    """
    with open_parquet(path, name, _REPLACE) as file:
        metadata = file.metadata
        rows = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        if rows != metadata.num_rows:
            raise UserError(f"{name}: damaged (its row groups hold {rows} rows); {_REPLACE}")
        if rows:
            check_type(file.schema_arrow, name, column)
        return int(rows)


def check_type(schema: pa.Schema, name: str, column: str) -> None:
    """Raise `NoTextColumn` unless the column is there, once, and holds text."""
    if (count := schema.names.count(column)) > 1:
        raise NoTextColumn(f"{name}: {count} columns are named {column!r}; rename all but one")
    if not count:
        raise no_column(name, column, schema.names)
    if not is_text(kind := schema.field(column).type):
        raise NoTextColumn(
            f"{name}: column {column!r} holds {printable(str(kind))[:_MESSAGE]}, not strings; "
            f"{_other_columns(schema.names)}"
        )


def no_column(name: str, column: str, columns: Sequence[str]) -> NoTextColumn:
    """Return the error for a file without the text column."""
    return NoTextColumn(f"{name}: no column {column!r}; {_other_columns(columns)}")


def _other_columns(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:_NAMES_SHOWN])
    if (more := len(columns) - _NAMES_SHOWN) > 0:
        shown += f" and {more} more"
    return f"set source.text_column to one of its columns: {printable(shown)[:_MESSAGE]}"


def check_pages(path: Path, name: str, column: str) -> None:
    """Decode the columns that later stages read, with the checksums of their pages.

    Args:
        name: The file's name in the source.

    Raises:
        UserError: A row group, which is named, is damaged or encrypted; or all texts are bytes
            that are not UTF-8.
    """
    with open_parquet(path, name, _REPLACE) as file:
        # pyarrow aborts the process if asked for the size of an encrypted column, but not if asked
        # to read it.
        with decoding(f"{name}: row group 0, column {column!r} is unreadable", _REPLACE):
            next(file.iter_batches(1, row_groups=[0], columns=[column]), None)
        _check_texts(file, name, column)
        names = file.schema_arrow.names
        for other in FINEWEB_SCHEMA.names:
            if other != column and names.count(other) == 1:
                _check_metadata(file, name, other)


def _check_texts(file: pq.ParquetFile, name: str, column: str) -> None:
    values = decoded = 0
    for group in range(file.metadata.num_row_groups):
        for texts in _read_group(file, name, group, column, _BATCH_BYTES, _REPLACE):
            if not decoded:
                found = as_binary(texts).drop_null().to_pylist()
                values, decoded = values + len(found), sum(map(_is_utf8, found))
    if values and not decoded:
        raise NoTextColumn(
            f"{name}: column {column!r} holds bytes that are not UTF-8; "
            f"{_other_columns(file.schema_arrow.names)}"
        )


def _check_metadata(file: pq.ParquetFile, name: str, column: str) -> None:
    for group in range(file.metadata.num_row_groups):
        with decoding(f"{name}: row group {group}, column {column!r} is unreadable", _REPLACE):
            for _ in file.iter_batches(
                _METADATA_ROWS, row_groups=[group], columns=[column], use_threads=False
            ):
                pass


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def open_parquet(path: Path, name: str = "", fix: str = _REBUILD) -> pq.ParquetFile:
    """Open a parquet file for reading in bounded memory, with page checksums verified.

    Args:
        name: The file's name in messages; empty: the path.
        fix: What to do about a damaged file.

    Raises:
        UserError: The file is missing or has no readable footer.
    """
    try:
        with decoding(f"{name or path}: not readable as parquet", fix):
            return pq.ParquetFile(
                path,
                binary_type=pa.large_binary(),  # dictionaries would be read slowly, and not all
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                page_checksum_verification=True,
            )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to create it") from None


@contextlib.contextmanager
def decoding(what: str, fix: str) -> Iterator[None]:
    """Raise errors of the decoder as a `UserError`; an error of the file system is not one."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:_MESSAGE]
        raise UserError(f"{what} ({reason}); {fix}") from None


def row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """Return the rows and the uncompressed bytes of ``column`` per row group, from the footer.

    Raises:
        UserError: The column is missing.
    """
    with open_parquet(path) as file:
        if not file.metadata.num_rows:
            return []
        check_type(file.schema_arrow, str(path), column)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        with decoding(f"{path}: damaged", _REBUILD):
            return [(group.num_rows, _column_bytes(file, group, column)) for group in groups]


def _column_bytes(file: pq.ParquetFile, group: pq.RowGroupMetaData, column: str) -> int:
    # The path alone may be that of field b of a struct a, whose name is b.
    for leaf, name in enumerate(file.schema.names):
        if name == column == group.column(leaf).path_in_schema:
            return int(group.column(leaf).total_uncompressed_size)
    raise pa.ArrowInvalid("a row group does not match the schema")


def read_texts(
    path: Path, column: str, start: int, stop: int
) -> Iterator[tuple[int, list[str | None]]]:
    """Read like `read_batches`, but yield Python strings: for a few documents.

    Raises:
        ValueError: A text is not UTF-8.
    """
    for row, texts in read_batches(path, column, start, stop):
        yield row, texts.cast(pa.large_string()).to_pylist()


def read_batches(
    path: Path, column: str, start: int, stop: int, batch_bytes: int = _BATCH_BYTES
) -> Iterator[tuple[int, pa.Array]]:
    """Read rows [start, stop) of a text column in batches.

    pyarrow cannot seek inside a row group: rows of the group before ``start`` are decoded and
    dropped.

    Args:
        batch_bytes: Approximate bytes per batch; a larger row is a batch of its own.

    Yields:
        The number of the batch's first row in the file, and the batch's texts as large_binary.

    Raises:
        UserError: The file is damaged.
    """
    pending: list[pa.Array] = []
    first, size = start, 0
    for texts in _read_rows(path, column, start, stop, batch_bytes):
        for part in _split_large(texts, batch_bytes):
            # Do not copy a large part to concatenate it with others.
            if pending and size + part.nbytes > 2 * batch_bytes:
                yield first, as_binary(pa.concat_arrays(pending))
                first, size, pending = first + sum(map(len, pending)), 0, []
            pending.append(part)
            size += part.nbytes
            if size >= batch_bytes:
                yield first, as_binary(pa.concat_arrays(pending) if len(pending) > 1 else part)
                first, size, pending = first + sum(map(len, pending)), 0, []
    if pending:
        yield first, as_binary(pa.concat_arrays(pending))


def read_columns(
    path: Path, columns: Sequence[str], start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """Read rows [start, stop) of short columns in batches.

    Raises:
        UserError: The file is damaged.
    """
    with (
        open_parquet(path) as file,
        decoding(f"{path}: columns {', '.join(columns)} are unreadable", _REBUILD),
    ):
        for group, at in _groups_between(file, start, stop):
            for batch in file.iter_batches(
                _METADATA_ROWS, row_groups=[group], columns=list(columns), use_threads=False
            ):
                low, high = max(start - at, 0), min(stop - at, len(batch))
                if low < high:
                    yield batch.slice(low, high - low)
                at += len(batch)


def _read_rows(
    path: Path, column: str, start: int, stop: int, batch_bytes: int
) -> Iterator[pa.Array]:
    with open_parquet(path) as file:
        for group, at in _groups_between(file, start, stop):
            for texts in _read_group(file, str(path), group, column, batch_bytes, _REBUILD):
                low, high = max(start - at, 0), min(stop - at, len(texts))
                if low < high:
                    yield texts.slice(low, high - low)
                at += len(texts)
                if at >= stop:
                    return


def _groups_between(file: pq.ParquetFile, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the row groups that hold any of the rows [start, stop), and the first row of each."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < stop and first + rows > start:
            yield group, first
        first += rows


def _read_group(
    file: pq.ParquetFile, name: str, index: int, column: str, batch_bytes: int, fix: str
) -> Iterator[pa.Array]:
    """Yield the texts of a row group, a few rows at a time."""
    with decoding(f"{name}: row group {index}, column {column!r} is unreadable", fix):
        group = file.metadata.row_group(index)
        rows, size = group.num_rows, max(1, _column_bytes(file, group, column))
        for batch in file.iter_batches(
            batch_size=max(1, min(_READ_ROWS, batch_bytes * rows // size)),
            row_groups=[index],
            columns=[column],
            use_threads=False,
        ):
            if batch.nbytes > batch_bytes:
                # Arrow returns freed memory late. A column of large documents may be a single page
                # of 200 MB, which would stay allocated while others are encoded.
                pa.default_memory_pool().release_unused()
            # By name: the column "a.b" also selects field b of a struct a.
            texts = batch.column(column)
            yield texts if texts.type in _LARGE_TYPES else as_binary(texts)
            rows -= len(batch)
        if rows:
            raise pa.ArrowInvalid(f"{-rows} rows too many" if rows < 0 else f"{rows} rows missing")


def _split_large(texts: pa.Array, batch_bytes: int) -> Iterator[pa.Array]:
    """Yield the texts in parts of at most two batches, or of one row."""
    if texts.nbytes <= 2 * batch_bytes or len(texts) <= 1:
        yield texts
        return
    middle = len(texts) // 2
    yield from _split_large(texts[:middle], batch_bytes)
    yield from _split_large(texts[middle:], batch_bytes)
