"""Reader of JSON Lines, and of `.json` files that hold a list of objects or one object.

Each line is parsed on its own, so fields that change type, appear or vanish do no harm.
"""

import io
import json
from collections.abc import Callable
from typing import Any

import orjson

from pipeline.download.readers.rows import LABELS, Rows, is_encodable
from pipeline.download.readers.text_stream import TOO_LARGE, lines, not_valid
from pipeline.runtime.errors import UserError

_MAX_VALUE_BYTES = 1 << 29
_NOT_AN_OBJECT = "not a JSON object"


class _Number(str):
    """A number as it is spelled in the file."""


def read_json(
    open_file: Callable[[], io.BufferedReader],
    name: str,
    column: str,
    encoding: str,
    is_lines: bool,
) -> Rows:
    """Yield the objects of a file, numbered by lines, or by their place in a list.

    Args:
        is_lines: By its suffix, a file of one line is JSON Lines, not a single JSON value.

    Raises:
        UserError: The file is one list that is too large, or one object that holds objects.
    """
    if (objects := _read_whole(open_file, name, column, encoding, is_lines)) is not None:
        yield from enumerate(objects, 1)
        return
    with open_file() as stream:
        for number, line in lines(stream):
            if line is None:
                yield number, TOO_LARGE
            elif (row := _parse(line, column, encoding)) is not None:
                yield number, row


def _parse(line: bytes, column: str, encoding: str) -> dict[str, Any] | str | None:
    """Return the object of a line, or why it is unusable; None for an empty line."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.strip():
            return None
    else:
        if not isinstance(row, dict):
            return _NOT_AN_OBJECT
        if float not in map(type, map(row.get, LABELS)):
            return row
    try:
        return _usable(_parse_as_spelled(line), column)
    except UnicodeDecodeError:
        return not_valid(encoding)
    except (ValueError, RecursionError):
        return "not valid JSON"


def _parse_as_spelled(data: bytes) -> Any:
    """Parse what orjson refuses or changes: NaN, large numbers, halves of surrogate pairs.

    Returns:
        The value with `_Number` for numbers, and null for NaN and Infinity: pandas writes missing
        values so.

    Raises:
        ValueError, RecursionError: The data are not JSON.
    """
    return json.loads(
        data.decode(), parse_int=_Number, parse_float=_Number, parse_constant=lambda _: None
    )


def _usable(row: Any, column: str) -> dict[str, Any] | str:
    """Return a value if it is an object with usable text, or why it is not."""
    if not isinstance(row, dict):
        return _NOT_AN_OBJECT
    text = row.get(column)
    return row if not isinstance(text, str) or is_encodable(text) else "half of a surrogate pair"


def _read_whole(
    open_file: Callable[[], io.BufferedReader],
    name: str,
    column: str,
    encoding: str,
    is_lines: bool,
) -> list[dict[str, Any] | str] | None:
    """Return the objects of a file that is one JSON value; None if it is JSON Lines."""
    with open_file() as stream:
        first = b"\n"
        while first and not first.strip():
            first = stream.readline(_MAX_VALUE_BYTES)
        start = first.lstrip()[:1]
        if start not in (b"[", b"{"):
            return None
        if isinstance(row := _parse(first, column, encoding), dict):
            if not is_lines and not stream.read(1 << 16).strip():
                _check_object(row, name, column)
            return None
        data = first + stream.read(_MAX_VALUE_BYTES - len(first) + 1)
    if len(data) > _MAX_VALUE_BYTES:
        if start == b"{":
            return None
        raise UserError(
            f"{name}: a JSON list of more than {_MAX_VALUE_BYTES >> 20} MiB, which would be in "
            "memory as a whole; write it as JSON Lines, an object per line"
        )
    try:
        value = _parse_as_spelled(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        _check_object(value, name, column)
        value = [value]
    return [_usable(row, column) for row in value]


def _check_object(row: dict[str, Any], name: str, column: str) -> None:
    """Check that the only object of a file is a document, rather than what holds the documents."""
    for key, value in row.items():
        if key != column and isinstance(value, list) and any(isinstance(v, dict) for v in value):
            raise UserError(
                f"{name}: one object that holds a list of objects, {key[:200]!r}, so it is unknown "
                "which are documents; write them as JSON Lines, an object per line, or as a list"
            )
