"""Conversion of other formats to parquet in FineWeb's schema, by `datasets`, in bounded memory."""

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.runtime.errors import UserError

# Part of a converted file's key: increase it when the same input would give different bytes.
VERSION = 1

PARQUET = (".parquet", ".parq", ".pq")
# File suffix -> builder of `datasets`.
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
    """Return the suffix that names the format, without compression: `.jsonl` for `b.jsonl.zst`."""
    pure = PurePosixPath(path.lower())
    return pure.with_suffix("").suffix if pure.suffix in COMPRESSIONS else pure.suffix


def _schema(column: str) -> pa.Schema:
    """Return FineWeb's schema with the text column renamed to ``column``."""
    fields = [pa.field(column, pa.string()) if f.name == "text" else f for f in FINEWEB_SCHEMA]
    if len({f.name for f in fields}) < len(fields):
        raise UserError(
            f"source.text_column: {column!r} is another column of FineWeb's schema; set it to the "
            "column that holds the documents"
        )
    return pa.schema(fields)


def to_parquet(source: Path, name: str, column: str, target: Path) -> None:
    """Write a file's documents to parquet in FineWeb's schema; missing columns are null.

    Each line of a `.txt` file is a document.

    Args:
        name: The file's name in the source; its suffix selects the reader.

    Raises:
        UserError: The file cannot be read as the format of its suffix, or has no text column.
    """
    schema = _schema(column)
    if not source.stat().st_size:
        raise UserError(f"{name}: the file is empty; remove it from the source")
    rows = (_cast_row(row, schema, column) for row in _documents(source, name, column))
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        while block := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(block, schema=schema))


def _documents(source: Path, name: str, column: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    builder = FORMATS[suffix_of(name)]
    options: dict[str, Any] = {}
    if builder == "csv":
        # Otherwise pandas would read the text 007 as 7, and NA as null.
        options = {"converters": dict.fromkeys([column, *FINEWEB_SCHEMA.names], str)}
        options |= {"keep_default_na": False, "sep": "\t" if suffix_of(name) == ".tsv" else ","}
    first = True
    files = glob.escape(str(source))  # `datasets` expands patterns
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
    except Exception as error:  # each reader raises its own types
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(
            f"{name}: not readable as {builder} ({reason}); remove the file from the source"
        ) from None


def _cast_row(row: dict[str, Any], schema: pa.Schema, column: str) -> dict[str, Any]:
    """Cast a row to the schema; values that cannot be cast are null."""
    cast = {}
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
        cast[field.name] = value
    return cast
