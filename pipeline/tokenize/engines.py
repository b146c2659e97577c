"""Two engines, one truth: what tiktoken says, said by gigatoken where both were proven to agree.

tiktoken is the reference. gigatoken is some twenty times as fast, and takes and gives whole Arrow
batches. It is an install that can be missing; the tokens are the same without it.

A document that even the reference cannot encode is one document's problem. Whether it can is a
property of its text, never of the engine: a document longer than `PIECE_BYTES` is cut where a space
follows a visible ASCII character. A word of the pattern begins there whatever surrounds it, so the
tokens of the pieces are those of the whole. A piece that cannot be cut so far is **unbroken**; it
is the reference's, in one, and beyond `UNBROKEN_BYTES` nobody's: its merges would take minutes and
gigabytes.
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
"""The release of gigatoken that `guard.PROVEN` is proven for."""

PIECE_BYTES = 1 << 19
"""tiktoken's pattern gives up on a run of a million spaces: pieces are safely shorter."""

UNBROKEN_BYTES = 1 << 22
"""The longest unbroken piece that is encoded: a million emoji, 5 s of one letter."""

# gigatoken 0.10 keeps every word it has met, and slows down over them: ten bytes for each byte of
# text where no word comes twice. Of ordinary text, 3 GB make this much.
_CACHE_BYTES = 256 << 20
_CACHE_TEXT_BYTES = 256 << 20  # of text, where the resident bytes cannot be read


class Unfit(Exception):
    """A document that has no tokens; the message is the reason that `skipped` counts it under."""


def reference(text: bytes) -> np.ndarray:
    """The tokens of a document, by tiktoken: (n,) uint16, without `<|endoftext|>`.

    Raises:
        Unfit: the bytes are no UTF-8, or the reference cannot encode them.
    """
    try:
        if len(text) <= PIECE_BYTES:
            return _tiktoken(text)
        borders = _borders(np.frombuffer(text, dtype=np.uint8))
        if _longest(borders) > UNBROKEN_BYTES:
            raise Unfit("unbroken")
        return np.concatenate([_tiktoken(text[a:b]) for a, b in _pieces(borders)])
    except UnicodeDecodeError:
        raise Unfit("not UTF-8") from None


def _tiktoken(text: bytes) -> np.ndarray:
    decoded = text.decode()
    try:
        return np.array(tokenizer.encode(decoded), dtype=TOKEN_DTYPE)
    except BaseException as error:
        # A panic of Rust's is no Exception; a signal is none of ours.
        if type(error).__name__ != "PanicException":
            raise
        raise Unfit("panic") from None


def _borders(data: np.ndarray) -> np.ndarray:
    """Where a text can be cut: its ends, and each space behind a visible ASCII character."""
    visible = (data[:-1] > 0x20) & (data[:-1] < 0x7F)
    return np.concatenate([[0], np.flatnonzero(visible & (data[1:] == 0x20)) + 1, [len(data)]])


def _longest(borders: np.ndarray) -> int:
    return int(np.diff(borders).max())


def _pieces(borders: np.ndarray) -> list[tuple[int, int]]:
    """Runs between borders, each as long as `PIECE_BYTES` allows."""
    pieces, start, end = [], 0, int(borders[-1])
    while start < end:
        last = int(np.searchsorted(borders, start + PIECE_BYTES, side="right")) - 1
        stop = int(borders[last])
        if stop == start:  # unbroken
            stop = int(borders[last + 1])
        pieces.append((start, stop))
        start = stop
    return pieces


def left_to_reference(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Which documents the fast engine may not encode.

    Args:
        data: (n,) uint8, valid UTF-8.
        offsets: (d + 1,) int64: document i is ``data[offsets[i] : offsets[i + 1]]``.

    Returns:
        (d,) bool: an unproven character, or an unbroken piece.
    """
    left = unicode_guard.unproven(data, offsets)
    for index in np.flatnonzero(np.diff(offsets) > PIECE_BYTES):
        document = data[offsets[index] : offsets[index + 1]]
        left[index] |= _longest(_borders(document)) > PIECE_BYTES
    return left


class Fast:
    """gigatoken, its memory bounded."""

    def __init__(self) -> None:
        self._new()

    def _new(self) -> None:
        import gigatoken

        self._backend: Any = None
        _return_freed_memory()  # the old one's, before the new one's is measured
        with resources.as_file(resources.files("pipeline.format") / "gpt2.tiktoken") as path:
            loaded = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2")
        self._backend = loaded.backend
        self._resident = _resident_bytes()
        self._text_bytes = 0

    def encode(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents, none of them `left_to_reference`, without a Python object for each.

        Args:
            data: (n,) uint8.
            offsets: (d + 1,) int64: document i is ``data[offsets[i] : offsets[i + 1]]``.

        Returns:
            The tokens of all documents, (n,) uint32, and how many each has, (d,) int64.
        """
        import awkward as ak

        # A string in awkward is a list of bytes that are called characters.
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        layout = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        encoded = self._backend.encode_batch(ak.Array(layout), parallel=False).layout
        ends = np.asarray(encoded.offsets.data)
        tokens = np.asarray(encoded.content.data)[ends[0] : ends[-1]]
        self._text_bytes += int(offsets[-1] - offsets[0])
        if self._is_full():
            self._new()
        return tokens, np.diff(ends)

    def _is_full(self) -> bool:
        if self._resident:
            return _resident_bytes() - self._resident > _CACHE_BYTES
        return self._text_bytes > _CACHE_TEXT_BYTES


def _resident_bytes() -> int:
    """The bytes of memory that this process holds; 0 where that is not known (not on Linux)."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    return pages * 4096


def _return_freed_memory() -> None:
    """Have the C library give the system what was freed: glibc keeps it, and it seems in use."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def why_not_fast() -> str | None:
    """Why gigatoken cannot serve here, in a few words; None where it can."""
    try:
        found = importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        return "gigatoken is not installed"
    return None if found == VERSION else f"gigatoken is {found}, not {VERSION}"


@lru_cache(maxsize=1)
def fast() -> Fast | None:
    """This process's gigatoken, its words kept from chunk to chunk; None where it cannot serve."""
    return Fast() if why_not_fast() is None else None
