"""Text files of any encoding as a stream of UTF-8 bytes.

What is not valid in the file's encoding is not valid UTF-8 in the stream either: a reader finds it
in the document that holds it, and the others are not affected.
"""

import codecs
import io
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.download.readers.decompress import read_chunks
from pipeline.runtime.errors import UserError

MAX_BYTES = 1 << 28
"""The largest document: tokenizing needs about ten times its size in memory."""

TOO_LARGE = f"larger than {MAX_BYTES >> 20} MiB"

# Byte order mark -> the encodings that may have it. UTF-32 first: its mark begins with the one of
# UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: ("utf-32", "utf-32-le"),
    codecs.BOM_UTF32_BE: ("utf-32", "utf-32-be"),
    codecs.BOM_UTF16_LE: ("utf-16", "utf-16-le"),
    codecs.BOM_UTF16_BE: ("utf-16", "utf-16-be"),
    codecs.BOM_UTF8: ("utf-8",),
}
_UNITS = ("utf-16", "utf-32")
_SAMPLE_BYTES = 1 << 14  # even, so that an odd sample is a complete file, which is not UTF-16
_CONTROLS = bytes(range(32))


def codec_name(encoding: str) -> str:
    """Return Python's name of an encoding.

    Raises:
        UserError: There is no such encoding of text.
    """
    try:
        b"a".decode(encoding, "replace")
        return codecs.lookup(encoding).name.removesuffix("-sig")
    except (LookupError, ValueError):
        raise UserError(
            f"source.encoding: {encoding!r} is no encoding that Python knows; use a name such as "
            "utf-8, utf-16, cp1252 or shift_jis"
        ) from None


def open_text(path: Path, name: str, encoding: str) -> io.BufferedReader:
    """Open a text file as a stream of UTF-8 without a byte order mark.

    Args:
        name: The file's name in the source.
        encoding: A name that `codec_name` returns.

    Raises:
        UserError: Here or while reading: the file is damaged or cut short, or has another encoding.
    """
    chunks = filter(None, read_chunks(path, name))
    return io.BufferedReader(_ChunkStream(_as_utf8(chunks, name, encoding)), 1 << 18)


def lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    r"""Yield the lines with their numbers from 1, as they are; only `\n` ends a line.

    None stands for a line of more than `MAX_BYTES`, which is not held in memory.
    """
    number = 0
    while line := stream.readline(MAX_BYTES):
        number += 1
        if len(line) < MAX_BYTES or line.endswith(b"\n"):
            yield number, line
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield number, None


def without_end(line: bytes) -> bytes:
    r"""Return a line without its end, `\n` or `\r\n`."""
    return line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line


def not_valid(encoding: str) -> str:
    """Return the reason in `skipped` for text that is not in the encoding."""
    return "not UTF-8" if encoding == "utf-8" else f"not {encoding}"


def _as_utf8(chunks: Iterator[bytes], name: str, encoding: str) -> Iterator[bytes]:
    start = b""
    while len(start) < _SAMPLE_BYTES and (chunk := next(chunks, b"")):
        start += chunk
    found = next((names for mark, names in _MARKS.items() if start.startswith(mark)), ())
    if found and encoding not in found:
        raise UserError(
            f"{name}: begins with the byte order mark of {found[-1]}; set source.encoding: "
            f"{found[0]}"
        )
    if not encoding.startswith(_UNITS) and (other := _without_mark(start[:_SAMPLE_BYTES])):
        raise UserError(
            f"{name}: looks like {other} without a byte order mark; set source.encoding: {other}"
        )
    if encoding == "utf-8":
        yield start.removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    if encoding in _UNITS and start and not found:
        raise UserError(
            f"{name}: has no byte order mark of {encoding}; set source.encoding: {encoding}-le or "
            f"{encoding}-be, or the encoding that it has"
        )
    # These codecs cannot mark bytes that they cannot decode, except for surrogates without a pair.
    errors = "surrogatepass" if encoding.startswith(_UNITS) else "surrogateescape"
    try:
        decoder: Any = codecs.getincrementaldecoder(encoding)(errors)
        decoded = _decode(chain([start], chunks), decoder)
        yield next(decoded, "").removeprefix("\ufeff").encode("utf-8", "surrogatepass")
        for text in decoded:
            yield text.encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise UserError(
            f"{name}: not {encoding} ({error}); set source.encoding to the encoding that it has"
        ) from None


def _without_mark(sample: bytes) -> str | None:
    """Return the name of UTF-16 or UTF-32 if the start of a file looks like it.

    Most of such text is valid UTF-8, with NUL and other control characters for the upper bytes.
    """
    evens, odds = sample[::2], sample[1::2]
    nuls = sample.count(0)
    if evens.count(0) and odds.count(0):
        return f"utf-32-{'le' if sample[0] else 'be'}" if 5 * nuls >= 2 * len(sample) else None
    if not nuls or len(sample) % 2:
        return None
    order, upper = ("le", odds) if odds.count(0) else ("be", evens)
    controls = len(upper) - len(upper.translate(None, _CONTROLS))
    # Fewer in Chinese text with some Latin.
    is_utf16 = 2 * controls >= len(upper) or (nuls >= 8 and 50 * nuls > len(sample))
    return f"utf-16-{order}" if is_utf16 else None


def _decode(chunks: Iterable[bytes], decoder: Any) -> Iterator[str]:
    yield from filter(None, map(decoder.decode, chunks))
    yield decoder.decode(b"", True)


class _ChunkStream(io.RawIOBase):
    """A raw stream over chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = filter(None, chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
