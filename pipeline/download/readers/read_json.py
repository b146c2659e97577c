"""Reader of JSON Lines, and of `.json` files that hold a list of objects or one object.

Each line is parsed on its own, so fields that change type, appear or vanish do no harm.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson

from pipeline.download.readers.rows import LABELS, Rows, is_encodable
from pipeline.download.readers.text_stream import TOO_LARGE, lines, not_valid
from pipeline.runtime.errors import UserError

_MAX_VALUE_BYTES = 1 << 29
_NOT_AN_OBJECT = "not a JSON object"
_SPACE = re.compile(r"[ \t\n\r]*")


class _Number(str):
    """A number as it is spelled in the file."""


# For what orjson refuses or changes: large numbers, halves of surrogate pairs, NaN and Infinity,
# which are null: pandas writes missing values so.
_AS_SPELLED = json.JSONDecoder(
    parse_int=_Number, parse_float=_Number, parse_constant=lambda _: None
)


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
        return _usable(_AS_SPELLED.decode(line.decode()), column)
    except UnicodeDecodeError:
        return not_valid(encoding)
    except (ValueError, RecursionError):
        return "not valid JSON"


def _items(text: str) -> Iterator[Any]:
    """Yield the items of a JSON list, one at a time: together they may need 80 times the memory.

    Raises:
        ValueError, RecursionError: The text is not a JSON list, or an item is nested too deeply.
    """

    def after_space(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches anything

    if not text.startswith("[", start := after_space(0)):
        raise ValueError("not a JSON list")
    at = after_space(start + 1)
    is_more = text[at : at + 1] != "]"
    while is_more:
        item, at = _AS_SPELLED.raw_decode(text, at)
        yield item
        at = after_space(at)
        if is_more := text[at : at + 1] == ",":
            at = after_space(at + 1)
    if text[at : at + 1] != "]" or after_space(at + 1) < len(text):
        raise ValueError("not a JSON list")


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
) -> Iterable[dict[str, Any] | str] | None:
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
        text = data.decode()
        del data
        if start == b"[":
            for _ in _items(text):
                pass  # all must be valid before the first is used: a line may begin with [, too
            return (_usable(row, column) for row in _items(text))
        value = _AS_SPELLED.decode(text)
    except (ValueError, RecursionError):
        return None
    _check_object(value, name, column)
    return [_usable(value, column)]


def _check_object(row: dict[str, Any], name: str, column: str) -> None:
    """Check that the only object of a file is a document, rather than what holds the documents."""
    for key, value in row.items():
        if key != column and isinstance(value, list) and any(isinstance(v, dict) for v in value):
            raise UserError(
                f"{name}: one object that holds a list of objects, {key[:200]!r}, so it is unknown "
                "which are documents; write them as JSON Lines, an object per line, or as a list"
            )
