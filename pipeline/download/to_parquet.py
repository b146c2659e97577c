"""Other formats to parquet in FineWeb's schema, read by `datasets` in bounded memory."""

import glob
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.runtime.errors import UserError

# Part of the key of a converted file: to be raised when the same input would give other bytes.
VERSION = 1

PARQUET = (".parquet", ".parq", ".pq")
# The builder of `datasets` that reads a format.
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

_ROWS = 1_000


def suffix_of(path: str) -> str:
    """What a file's name says of its format: `.jsonl` of a/b.jsonl.zst."""
    pure = PurePosixPath(path.lower())
    return pure.with_suffix("").suffix if pure.suffix in COMPRESSIONS else pure.suffix


def schema_with(column: str) -> pa.Schema:
    """FineWeb's schema, its text column called ``column``."""
    fields = [pa.field(column, pa.string()) if f.name == "text" else f for f in FINEWEB_SCHEMA]
    if len({f.name for f in fields}) < len(fields):
        raise UserError(f"source.text_column: {column!r} is a column of FineWeb that is no text")
    return pa.schema(fields)


def to_parquet(source: Path, name: str, column: str, target: Path) -> None:
    """Write the documents of a file as parquet in FineWeb's schema; what it lacks is null.

    A line of a `.txt` file is a document; it holds nothing but text.

    Args:
        name: the file's name, which says its format, also in messages.
        column: the text column.

    Raises:
        UserError: the file is not readable as its name says, or lacks the text column.
    """
    schema = schema_with(column)
    if not source.stat().st_size:
        raise UserError(f"{name}: it is empty; leave it out")
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for row in _documents(source, name, column):
            rows.append(_normal(row, schema, column))
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _documents(source: Path, name: str, column: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    builder = FORMATS[suffix_of(name)]
    options: dict[str, Any] = {}
    if builder == "csv":
        # pandas would turn the text 007 into 7, and NA into nothing.
        options = {"converters": dict.fromkeys([column, *FINEWEB_SCHEMA.names], str)}
        options |= {"keep_default_na": False, "sep": "\t" if suffix_of(name) == ".tsv" else ","}
    first = True
    files = glob.escape(str(source))  # it would be taken for a pattern
    try:
        data = load_dataset(builder, data_files=files, split="train", streaming=True, **options)
        for row in data:
            if builder == "text":
                row = {column: row["text"]}
            if first and column not in row:
                raise UserError(
                    f"{name}: no column {column!r}; set source.text_column to one of its columns: "
                    f"{', '.join(map(str, row))}"
                )
            first = False
            yield row
    except UserError:
        raise
    except Exception as error:  # each reader has its own
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"{name}: not readable as {builder} ({reason}); leave it out") from None


def _normal(row: dict[str, Any], schema: pa.Schema, column: str) -> dict[str, Any]:
    """A document's row in the schema: what cannot be of a column's type is null."""
    normal = {}
    for field in schema:
        value = row.get(field.name)
        if value is not None and field.name != column and value == "":
            value = None
        if value is not None and field.type == pa.string():
            value = value if isinstance(value, str) else str(value)
        elif value is not None:
            kind = float if field.type == pa.float64() else int
            try:
                value = kind(value)
            except (TypeError, ValueError):
                value = None
        normal[field.name] = value
    return normal
