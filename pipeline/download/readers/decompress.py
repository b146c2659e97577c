"""Decompression of a file as a stream that is checked to its end.

A file may hold several compressed streams, one after the other, as parallel compressors and `cat`
write them. A file that was cut short is an error with every codec, and so is what follows the last
stream, except NUL bytes, with which tapes and `xz` pad.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

import zstandard

from pipeline.runtime.errors import UserError

# Of compressed data: a hundred times as much may come out at once.
_CHUNK_BYTES = 1 << 16
_FIX = "copy it to this place again, or remove it from the source"


class _Decompressor(Protocol):
    """What the decompressors of one stream have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


_CODECS: dict[str, Callable[[], _Decompressor]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    # As `zstd --long=31` needs it; the memory is taken only if a file was written so.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}
COMPRESSIONS = tuple(_CODECS)
# No text begins so.
_MAGIC = {
    ".gz": b"\x1f\x8b\x08",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh91AY&SY",
    ".xz": b"\xfd7zXZ\0",
}
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)


def read_chunks(path: Path, name: str) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if the suffix of its name says so.

    Args:
        name: The file's name in the source.

    Raises:
        UserError: The file is damaged, cut short, or not compressed as its suffix says.
    """
    suffix = PurePosixPath(name.lower()).suffix
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        if suffix in _CODECS:
            yield from _decompress(chunks, name, suffix)
            return
        first = next(chunks, b"")
        for suffix, magic in _MAGIC.items():
            if first.startswith(magic):
                raise UserError(f"{name}: compressed, as {suffix}; rename it to end with {suffix}")
        yield first
        yield from chunks


def _decompress(chunks: Iterator[bytes], name: str, suffix: str) -> Iterator[bytes]:
    stream = _CODECS[suffix]()
    for chunk in chunks:
        while chunk:
            if stream.eof:
                if not (chunk := chunk.lstrip(b"\0")):
                    break
                stream = _CODECS[suffix]()
            try:
                yield stream.decompress(chunk)
            except _ERRORS as error:
                raise UserError(
                    f"{name}: damaged, or not a {suffix} file ({error}); {_FIX}"
                ) from None
            chunk = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise UserError(f"{name}: cut short (the {suffix} stream does not end); {_FIX}")
