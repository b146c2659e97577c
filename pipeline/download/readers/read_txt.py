"""Reader of `.txt` files: a document is a line, a paragraph, or the whole file."""

import io
from collections.abc import Iterator

from pipeline.download.readers.rows import Rows
from pipeline.download.readers.text_stream import (
    MAX_BYTES,
    TOO_LARGE,
    lines,
    not_valid,
    without_end,
)
from pipeline.runtime.errors import UserError


def read_txt(
    stream: io.BufferedReader, name: str, column: str, encoding: str, documents: str
) -> Rows:
    """Yield the documents of a text file, numbered by their first line.

    Args:
        documents: `line`, `paragraph` or `file`, see `source.text_documents`.

    Raises:
        UserError: The file is one document that is too large.
    """
    if documents == "file":
        found = _whole(stream, name)
    else:
        found = lines(stream) if documents == "line" else _paragraphs(stream)
    for number, document in found:
        if document is None:
            yield number, TOO_LARGE
            continue
        try:
            text = (document if documents == "file" else without_end(document)).decode()
        except UnicodeDecodeError:
            yield number, not_valid(encoding)
        else:
            yield number, {column: text}


def _whole(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, bytes | None]]:
    if len(document := stream.read(MAX_BYTES + 1)) > MAX_BYTES:
        raise UserError(
            f"{name}: {TOO_LARGE}, as one document; set source.text_documents to paragraph or line"
        )
    if document:
        yield 1, document


def _paragraphs(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines up to an empty one, or one of spaces, joined."""
    first, size = 0, 0
    held: list[bytes] = []
    for number, line in lines(stream):
        if line is not None and not line.strip():
            if size:
                yield first, b"".join(held) if size <= MAX_BYTES else None
            size, held = 0, []
            continue
        first = first if size else number
        size += MAX_BYTES + 1 if line is None else len(line)
        if size > MAX_BYTES:
            held = []
        elif line is not None:
            held.append(line)
    if size:
        yield first, b"".join(held) if size <= MAX_BYTES else None
