"""Conversion of other formats to parquet in FineWeb's schema, in bounded memory.

Only the text and the metadata are read, by readers that guess no types. A line or row that is
unusable is left out and counted by reason; a file of which more than 1 % is unusable is refused, as
it probably is of another format.
"""

import contextlib
import math
import re
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.download.readers.decompress import COMPRESSIONS, read_chunks
from pipeline.download.readers.read_arrow import read_arrow
from pipeline.download.readers.read_csv import read_csv, read_tsv
from pipeline.download.readers.read_json import read_json
from pipeline.download.readers.read_txt import read_txt
from pipeline.download.readers.rows import METADATA, Rows, is_encodable
from pipeline.download.readers.text_stream import (
    MAX_BYTES,
    TOO_LARGE,
    codec_name,
    not_valid,
    open_text,
)
from pipeline.format.parquet import FINEWEB_SCHEMA, no_column
from pipeline.runtime.errors import UserError

# Part of a converted file's key: increase it when the same input would give different bytes.
VERSION = 2

PARQUET = (".parquet", ".parq", ".pq")
# File suffix -> reader.
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".arrow": "arrow",
}

# A row group: `tokenize` decodes it as a whole, even for a chunk that begins in its middle.
_GROUP_CHARS = 1 << 22
_GROUP_ROWS = 1 << 14
_INT64 = range(-(1 << 63), 1 << 63)
_INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_KINDS = {bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class ReadOptions:
    """The parameters of a source that decide what is read from a file.

    Raises:
        UserError: There is no such encoding.
    """

    column: str
    """`source.text_column`."""
    text_documents: str
    """`source.text_documents`."""
    encoding: str
    """`source.encoding`, under Python's name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", codec_name(self.encoding))

    def key(self, name: str) -> list[str]:
        """Return what decides the conversion of a file of this name."""
        reader = FORMATS[suffix_of(name)]
        key = [reader, compression_of(name), self.column]
        if reader != "arrow":
            key.append(self.encoding)
        if reader == "txt":
            key.append(self.text_documents)
        return key


@dataclass(frozen=True)
class SkippedRows:
    """The lines or rows of a file that are left out for one reason."""

    count: int
    first: int
    """The number of the first one, from 1: of a line, or of a row in a list or an Arrow file."""


def suffix_of(path: str) -> str:
    """Return the suffix that names the format, without compression: `.jsonl` for `b.jsonl.zst`."""
    return PurePosixPath(path.lower().removesuffix(compression_of(path))).suffix


def compression_of(path: str) -> str:
    """Return the suffix that names the compression, `.zst` for `b.jsonl.zst`, or nothing."""
    suffix = PurePosixPath(path.lower()).suffix
    return suffix if suffix in COMPRESSIONS else ""


def to_parquet(
    source: Path, name: str, options: ReadOptions, target: Path
) -> dict[str, SkippedRows]:
    """Write a file's documents to parquet in FineWeb's schema; missing values are null.

    Args:
        name: The file's name in the source; its suffix selects the reader.

    Returns:
        What was left out, by reason.

    Raises:
        UserError: The file is damaged, has no text column, or is not of the format of its suffix.
    """
    schema = _schema(options.column)
    rows = _UsableRows(name, options.column, options.encoding, schema.names)
    with (
        contextlib.closing(_read(source, name, options, target)) as found,
        pq.ParquetWriter(
            target,
            schema,
            compression="zstd",
            use_dictionary=["dump", "file_path", "language"],  # of few values each
            write_statistics=False,
        ) as writer,
        # Compression takes about as long as reading, and both can run at once.
        ThreadPoolExecutor(1) as pool,
    ):
        written: Future[None] | None = None
        for group in _groups(rows.of(found)):
            table = _table(group, schema)
            if written:
                written.result()
            written = pool.submit(writer.write_table, table, row_group_size=len(group))
        if written:
            written.result()
    rows.check()
    return rows.skipped


def _schema(column: str) -> pa.Schema:
    """Return FineWeb's schema with the text column renamed to ``column``."""
    if column in METADATA:
        raise UserError(
            f"source.text_column: {column!r} is another column of FineWeb's schema; set it to the "
            "column that holds the documents"
        )
    metadata = [field for field in FINEWEB_SCHEMA if field.name in METADATA]
    return pa.schema([pa.field(column, pa.string()), *metadata])


def _read(
    source: Path, name: str, options: ReadOptions, target: Path
) -> Generator[Any, None, None]:
    """Yield what the reader of the file's format yields."""
    reader, column, encoding = FORMATS[suffix_of(name)], options.column, options.encoding

    def open_file() -> Any:
        return open_text(source, name, encoding)

    if reader == "json":
        yield from read_json(open_file, name, column, encoding, suffix_of(name) != ".json")
    elif reader == "arrow":
        with _decompressed(source, name, target.with_suffix(".plain")) as plain:
            yield from read_arrow(plain, name, column)
    else:
        with open_file() as stream:
            if reader == "txt":
                yield from read_txt(stream, name, column, encoding, options.text_documents)
            else:
                read = read_csv if reader == "csv" else read_tsv
                yield from read(stream, name, column, encoding)


@contextlib.contextmanager
def _decompressed(source: Path, name: str, plain: Path) -> Iterator[Path]:
    """Decompress a file to ``plain``, for a reader that must seek; it is removed at the end."""
    if not compression_of(name):
        yield source
        return
    try:
        with open(plain, "wb") as file:
            file.writelines(read_chunks(source, name))
        yield plain
    finally:
        plain.unlink(missing_ok=True)


@dataclass
class _UsableRows:
    """The usable rows of a file, and what is known of the others."""

    name: str
    column: str
    encoding: str
    wanted: list[str]
    skipped: dict[str, SkippedRows] = field(default_factory=dict)
    total: int = 0
    without: int = 0
    """The rows without the text column, of which `columns` are those of the first."""
    columns: list[str] = field(default_factory=list)
    has_column: bool = False
    """Whether a row has the text column."""

    def of(self, rows: Rows) -> Iterator[list[Any]]:
        """Yield the wanted values of rows with text or null; count the other rows.

        A row without the text column is one with null: Spark leaves fields with null out.
        """
        column = self.column
        for number, row in rows:
            self.total += 1
            if isinstance(row, str):
                self._skip(row, number)
                continue
            text = row.get(column)
            if column in row:
                self.has_column = True
            else:
                self.without += 1
                self.columns = self.columns or list(row)
            if type(text) is str and len(text) > MAX_BYTES:
                self._skip(TOO_LARGE, number)
            elif type(text) is str or text is None:
                yield list(map(row.get, self.wanted))
            else:
                self._skip(f"{_KINDS.get(type(text), 'a number')}, not a string", number)

    def _skip(self, reason: str, number: int) -> None:
        known = self.skipped.get(reason, SkippedRows(0, number))
        self.skipped[reason] = SkippedRows(known.count + 1, known.first)

    def check(self) -> None:
        """Raise a `UserError` if no row has the column, or more than 1 % are unusable."""
        unusable = sum(rows.count for rows in self.skipped.values())
        if not self.has_column and self.without > unusable:
            raise no_column(self.name, self.column, self.columns)
        if 100 * unusable <= self.total:
            return
        reason, rows = max(self.skipped.items(), key=lambda item: item[1].count)
        fix = "repair the file or remove it from the source"
        if reason.endswith("not a string"):
            fix = "set source.text_column to a column of strings"
        elif reason == not_valid(self.encoding):
            fix = "set source.encoding to the encoding that it has"
        raise UserError(
            f"{self.name}: {unusable} of {self.total} lines or rows are unusable, more than 1 % "
            f"({reason}: {rows.count}, the first is number {rows.first}); {fix}"
        )


def _groups(rows: Iterator[list[Any]]) -> Iterator[list[list[Any]]]:
    """Yield the rows of one row group after the other."""
    group: list[list[Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum([len(value) for value in row if type(value) is str])
        if size >= _GROUP_CHARS or len(group) == _GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _table(rows: list[list[Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for kind, column in zip(schema, zip(*rows, strict=True), strict=True):
        values = list(column)
        if values.count(None) == len(values):
            pass
        elif kind.type == pa.int64():
            values = [_integer(value) for value in values]
        elif kind.type == pa.float64():
            values = [_number(value) for value in values]
        elif kind.name in METADATA:
            values = [v if type(v) is str and v.isascii() else _label(v) for v in values]
        columns.append(pa.array(values, kind.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _label(value: Any) -> str | None:
    """Return a string, or an integer as it is spelled; null for anything else."""
    if isinstance(value, str):
        return value if is_encodable(value) else None
    return str(value) if type(value) is int else None


def _integer(value: Any) -> int | None:
    """Return an integer of 64 bits, also if it is spelled as a string; null for anything else."""
    if value.is_integer() if isinstance(value, float) else _is_spelled(value, _INTEGER):
        value = int(value)
    return value if type(value) is int and value in _INT64 else None


def _number(value: Any) -> float | None:
    """Return a finite number, also if it is spelled as a string; null for anything else."""
    if type(value) not in (int, float) and not _is_spelled(value, _NUMBER):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _is_spelled(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
