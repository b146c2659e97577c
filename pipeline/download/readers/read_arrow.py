"""Reader of Arrow IPC: the stream format of `datasets`, and the file format (Feather)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.download.readers.rows import METADATA, Rows
from pipeline.format.parquet import check_type, decoding, is_text
from pipeline.runtime.errors import UserError

_FILE_MAGIC = b"ARROW1"
_ROWS = 16  # at a time as Python objects; a dictionary may hold a large document many times
_FIX = "write or copy the file again, or remove it from the source"
_NOT_UTF8 = "not UTF-8"
# The type of the same bytes that need not be UTF-8 to be valid.
_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def read_arrow(path: Path, name: str, column: str) -> Rows:
    """Yield the rows of a file, which is not compressed as a whole, numbered from 1.

    Raises:
        UserError: The file is damaged or cut short, or has no such column of text.
    """
    number = 0
    for batch in _batches(path, name, column):
        names = batch.schema.names
        for start in range(0, batch.num_rows, _ROWS):
            with decoding(f"{name}: damaged", _FIX):
                columns = [_to_python(c.slice(start, _ROWS)) for c in batch.columns]
            for values in zip(*columns, strict=True):
                number += 1
                row = dict(zip(names, values, strict=True))
                if isinstance(row[column], bytes):  # which are not UTF-8
                    yield number, _NOT_UTF8
                else:
                    yield number, row


def _batches(path: Path, name: str, column: str) -> Iterator[pa.RecordBatch]:
    """Yield the record batches that have rows, with the wanted columns and valid buffers."""
    with contextlib.ExitStack() as stack:
        with decoding(f"{name}: not readable", _FIX):
            source = stack.enter_context(pa.OSFile(str(path)))
        is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        source.seek(0)
        for batch, schema in (_read_file if is_file else _read_streams)(source, name, column):
            if not batch.num_rows:
                continue
            check_type(schema, name, column)
            with decoding(f"{name}: damaged", _FIX):
                columns = [_as_bytes(c) for c in batch.columns]
                for array in columns:
                    array.validate(full=True)
            yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _read_file(
    source: pa.NativeFile, name: str, column: str
) -> Iterator[tuple[pa.RecordBatch, pa.Schema]]:
    """Yield the batches of a file, with the schema of all columns."""
    with decoding(f"{name}: not readable as an Arrow file, or cut short", _FIX):
        schema = pa.ipc.open_file(source).schema
        reader = pa.ipc.open_file(source, options=_wanted(schema, column))
    for index in range(reader.num_record_batches):
        with decoding(f"{name}: record batch {index} is damaged", _FIX):
            batch = reader.get_batch(index)
        yield batch, schema


def _read_streams(
    source: pa.NativeFile, name: str, column: str
) -> Iterator[tuple[pa.RecordBatch, pa.Schema]]:
    """Yield the batches of all streams in a file; the end of a stream is marked."""
    if not (size := source.size()):
        raise UserError(f"{name}: cut short (it has no bytes, not even a schema); {_FIX}")
    while (start := source.tell()) < size:
        with decoding(f"{name}: not readable as an Arrow stream, or cut short", _FIX):
            schema = pa.ipc.open_stream(source).schema
            source.seek(start)
            reader = pa.ipc.open_stream(source, options=_wanted(schema, column))
        end = source.tell()
        while True:
            with decoding(f"{name}: damaged or cut short", _FIX):
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
            end = source.tell()
            yield batch, schema
        if source.tell() == end:
            raise UserError(f"{name}: cut short (the Arrow stream has no end); {_FIX}")


def _wanted(schema: pa.Schema, column: str) -> pa.ipc.IpcReadOptions:
    """Select the columns of text and metadata that are there once and hold one value.

    If there is none, all columns are selected: a part without rows need not have them.
    """
    names = schema.names
    wanted = [names.index(n) for n in (column, *METADATA) if names.count(n) == 1]
    flat = [index for index in wanted if not pa.types.is_nested(schema.types[index])]
    return pa.ipc.IpcReadOptions(included_fields=flat)


def _as_bytes(array: pa.Array) -> pa.Array:
    """Return strings as bytes, whose validity does not depend on UTF-8, and others as they are."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray):
        return pa.DictionaryArray.from_arrays(array.indices, _as_bytes(array.dictionary))
    return array.view(_BYTES[array.type]) if array.type in _BYTES else array


def _to_python(array: pa.Array) -> list[Any]:
    """Return the values: text as `str`, or `bytes` if not UTF-8; dates as Arrow spells them."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if is_text(array.type):
        return [_decoded(value) for value in array.to_pylist()]
    if pa.types.is_temporal(array.type) or pa.types.is_decimal(array.type):
        try:
            array = array.cast(pa.string())
        except pa.ArrowException:  # an interval, or an unknown time zone
            return [None] * len(array)
    return list(array.to_pylist())


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value
