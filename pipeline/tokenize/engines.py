"""The two tokenizer engines: tiktoken, the reference, and gigatoken, the fast one.

gigatoken is some twenty times as fast, encodes Arrow buffers in batches, and is used only for
documents on which both engines were proven to agree. It is an optional install: the tokens are the
same without it.

Whether a document can be encoded depends on its text alone, never on the engine. A document longer
than `PIECE_BYTES` is cut at spaces that follow a visible ASCII character. A word of GPT-2's pattern
begins there whatever surrounds it, so the tokens of the pieces are the tokens of the document. A
piece that has no such space within `PIECE_BYTES` is **unbroken**: the reference encodes it as one,
and beyond `MAX_UNBROKEN_BYTES` it is skipped, because its merges would take minutes and gigabytes.
"""

import ctypes
import importlib.metadata
import sys
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.format import tokenizer
from pipeline.format.shards import TOKEN_DTYPE
from pipeline.tokenize import unicode_guard

Name = Literal["gigatoken", "tiktoken"]

VERSION = "0.10.0"
"""The release of gigatoken for which `unicode_guard.PROVEN` is proven."""

PIECE_BYTES = 1 << 19
"""tiktoken's pattern fails on a run of a million spaces; pieces are well below that."""

MAX_UNBROKEN_BYTES = 1 << 22
"""The longest unbroken piece that is encoded: a million emoji, or 4 MB of one letter in 5 s."""

# gigatoken 0.10 caches every word it meets and slows down as the cache grows: ten bytes per byte of
# text if no word repeats. 3 GB of ordinary text reach this limit.
_CACHE_BYTES = 256 << 20
_CACHE_TEXT_BYTES = 256 << 20  # limit on text, where resident memory cannot be read


class Unencodable(Exception):
    """A document that cannot be encoded; the message is its reason in `skipped`."""


def reference(text: bytes) -> np.ndarray:
    """Encode a document with tiktoken: (n,) uint16, without `<|endoftext|>`.

    Raises:
        Unencodable: The bytes are not UTF-8, or tiktoken cannot encode them.
    """
    try:
        if len(text) <= PIECE_BYTES:
            return _tiktoken(text)
        cuts = _cut_points(np.frombuffer(text, dtype=np.uint8))
        if np.diff(cuts).max() > MAX_UNBROKEN_BYTES:
            raise Unencodable("unbroken")
        return np.concatenate([_tiktoken(text[a:b]) for a, b in _pieces(cuts)])
    except UnicodeDecodeError:
        raise Unencodable("not UTF-8") from None


def _tiktoken(text: bytes) -> np.ndarray:
    decoded = text.decode()
    try:
        return np.array(tokenizer.encode(decoded), dtype=TOKEN_DTYPE)
    except BaseException as error:
        # A Rust panic is not an Exception; signals pass through.
        if type(error).__name__ != "PanicException":
            raise
        raise Unencodable("panic") from None


def _cut_points(data: np.ndarray) -> np.ndarray:
    """Return where a text may be cut: its ends, and each space after a visible ASCII character."""
    visible = (data[:-1] > 0x20) & (data[:-1] < 0x7F)
    return np.concatenate([[0], np.flatnonzero(visible & (data[1:] == 0x20)) + 1, [len(data)]])


def _pieces(cuts: np.ndarray) -> list[tuple[int, int]]:
    """Return spans between cut points, each as long as `PIECE_BYTES` allows."""
    pieces, start, end = [], 0, int(cuts[-1])
    while start < end:
        last = int(np.searchsorted(cuts, start + PIECE_BYTES, side="right")) - 1
        stop = int(cuts[last])
        if stop == start:  # unbroken
            stop = int(cuts[last + 1])
        pieces.append((start, stop))
        start = stop
    return pieces


def needs_reference(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Find the documents that the fast engine must not encode.

    Args:
        data: (n,) uint8, valid UTF-8.
        offsets: (d + 1,) int64: document i is ``data[offsets[i] : offsets[i + 1]]``.

    Returns:
        (d,) bool: whether a document has an unproven character or an unbroken piece.
    """
    found = unicode_guard.unproven(data, offsets)
    for index in np.flatnonzero(np.diff(offsets) > PIECE_BYTES):
        document = data[offsets[index] : offsets[index + 1]]
        found[index] |= np.diff(_cut_points(document)).max() > PIECE_BYTES
    return found


class FastEngine:
    """gigatoken with bounded memory."""

    def __init__(self) -> None:
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._backend: Any = None
        _return_freed_memory()  # release the old backend before measuring the new one
        with resources.as_file(resources.files("pipeline.format") / "gpt2.tiktoken") as path:
            loaded = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2")
        self._backend = loaded.backend
        self._resident = _resident_bytes()
        self._text_bytes = 0

    def encode(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents that do not need the reference, without a Python object for each.

        Args:
            data: (n,) uint8.
            offsets: (d + 1,) int64: document i is ``data[offsets[i] : offsets[i + 1]]``.

        Returns:
            The tokens of all documents, (n,) uint32, and the number of each, (d,) int64.
        """
        import awkward as ak

        # In awkward a string is a list of bytes marked as characters.
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        layout = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        encoded = self._backend.encode_batch(ak.Array(layout), parallel=False).layout
        ends = np.asarray(encoded.offsets.data)
        tokens = np.asarray(encoded.content.data)[ends[0] : ends[-1]]
        self._text_bytes += int(offsets[-1] - offsets[0])
        if self._cache_is_full():
            self._load()
        return tokens, np.diff(ends)

    def _cache_is_full(self) -> bool:
        if self._resident:
            return _resident_bytes() - self._resident > _CACHE_BYTES
        return self._text_bytes > _CACHE_TEXT_BYTES


def _resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if unknown (not on Linux)."""
    if sys.platform != "linux":
        return 0
    return 4096 * int(Path("/proc/self/statm").read_bytes().split()[1])


def _return_freed_memory() -> None:
    """Have glibc return freed memory to the system: it would count as resident otherwise."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def unavailable_reason() -> str | None:
    """Return why gigatoken cannot be used here; None if it can."""
    try:
        found = importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        return "gigatoken is not installed"
    return None if found == VERSION else f"gigatoken is {found}, not {VERSION}"


@lru_cache(maxsize=1)
def fast() -> FastEngine | None:
    """Return this process's gigatoken, its word cache kept between chunks; None if unavailable."""
    return FastEngine() if unavailable_reason() is None else None
