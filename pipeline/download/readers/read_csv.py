"""Readers of `.csv` and `.tsv` files: every value is a string, and no column is an index."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.download.readers.rows import METADATA, Rows, is_encodable
from pipeline.download.readers.text_stream import (
    MAX_BYTES,
    TOO_LARGE,
    lines,
    not_valid,
    without_end,
)
from pipeline.format.parquet import NoTextColumn, no_column
from pipeline.runtime.errors import UserError

_WRONG_COUNT = "more or fewer fields than the header"


class _Header:
    """The names of the columns, and where the wanted ones are."""

    def __init__(self, fields: Sequence[str], name: str, column: str, encoding: str) -> None:
        names = _without_empty_end(fields, 1)
        # In a file of one column, a delimiter at the end of a row is rather part of the text.
        self._may_end_empty = len(fields) > 1
        if column not in names:
            raise no_column(name, column, names)
        if names.count(column) > 1:
            raise UserError(f"{name}: two columns are named {column!r}; rename one of them")
        self._count = len(names)
        self._text = names.index(column)
        # Of two columns of one name it is unknown which is meant.
        self._wanted = {n: names.index(n) for n in (column, *METADATA) if names.count(n) == 1}
        self._encoding = encoding

    def row(self, fields: list[str]) -> dict[str, Any] | str:
        if len(fields) != self._count:
            if not self._may_end_empty:
                return _WRONG_COUNT
            fields = _without_empty_end(fields, self._count)
            if len(fields) != self._count:
                return _WRONG_COUNT
        if not is_encodable(fields[self._text]):
            return not_valid(self._encoding)
        return {name: fields[index] for name, index in self._wanted.items()}


def _check_delimiter(fields: Sequence[str], name: str, column: str) -> None:
    if len(fields) > 1 or column in fields:
        return
    for delimiter, fix in ((";", "write the file with commas"), ("\t", "rename the file to .tsv")):
        if delimiter in fields[0]:
            raise NoTextColumn(
                f"{name}: no column {column!r}, and the header has {delimiter!r} but no comma, "
                f"which is the delimiter of .csv; {fix}"
            )


def _without_empty_end(fields: Sequence[str], count: int) -> list[str]:
    """Return the fields without empty ones beyond ``count``: delimiters at the end of the line."""
    end = len(fields)
    while end > count and not fields[end - 1]:
        end -= 1
    return list(fields[:end])


def read_csv(stream: io.BufferedReader, name: str, column: str, encoding: str) -> Rows:
    r"""Yield the rows of a CSV file, numbered by their first line.

    A value may be in double quotes, and then hold line ends, which are `\n`, `\r\n` or `\r`.

    Raises:
        UserError: There is no such column, or a fault in the quotes, after which it is unknown
            where rows begin.
    """
    csv.field_size_limit(MAX_BYTES)
    text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(_bounded(text, name), strict=True)
    header, first = None, 1
    try:
        for fields in reader:
            if not fields:
                pass  # an empty line
            elif header is None:
                _check_delimiter(fields, name, column)
                header = _Header(fields, name, column, encoding)
            else:
                yield first, header.row(fields)
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}: not readable as CSV in the row that begins at line {first} ({error}); put "
            "values with a quote into quotes, and double the quote"
        ) from None


def _bounded(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    while line := text.readline(MAX_BYTES):
        if len(line) == MAX_BYTES:
            raise UserError(f"{name}: a line {TOO_LARGE}; remove the file from the source")
        yield line


def read_tsv(stream: io.BufferedReader, name: str, column: str, encoding: str) -> Rows:
    r"""Yield the rows of a TSV file, numbered by line.

    Values hold neither tabs nor `\n`, so quotes are ordinary characters.

    Raises:
        UserError: There is no such column.
    """
    header = None
    for number, line in lines(stream):
        if line is None:
            yield number, TOO_LARGE
        elif content := without_end(line):
            fields = content.decode("utf-8", "surrogateescape").split("\t")
            if header is None:
                header = _Header(fields, name, column, encoding)
            else:
                yield number, header.row(fields)
