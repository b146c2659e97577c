"""A batch as the heuristics see it: surface words, lines and characters, as positions of bytes."""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipeline.curate.characters import byte_codes
from pipeline.curate.hashing import span_hashes
from pipeline.curate.words import Texts, surface_spans

NEWLINE = 10


class Spans(NamedTuple):
    """Parts of rows, in order, such as lines."""

    starts: np.ndarray
    """(k,) int64: first byte of each."""
    ends: np.ndarray
    """(k,) int64: one past its last byte."""
    rows: np.ndarray
    """(k,) int64: its row."""

    def where(self, chosen: np.ndarray) -> "Spans":
        """Return the spans that a (k,) bool mask or (j,) indices choose."""
        return Spans(self.starts[chosen], self.ends[chosen], self.rows[chosen])


class Surface:
    """The surface words and characters of a batch."""

    def __init__(self, texts: Texts) -> None:
        self.data, self.offsets = texts
        self.rows = len(texts.offsets) - 1
        """Number of rows."""
        self.codes = byte_codes(self.data)
        """(n,) uint8: `characters.byte_codes`."""
        self.starts, self.ends = surface_spans(texts, self.codes)
        """(w,) int64 each: the words."""
        self.firsts = np.searchsorted(self.starts, self.offsets)
        """(d + 1,) int64: the first word of each row."""

    @cached_property
    def hashes(self) -> np.ndarray:
        """(w,) uint64: hashes of the words."""
        return span_hashes(self.data, self.starts, self.ends)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(w,) int64: characters of each word."""
        return self.characters(self.starts, self.ends)

    @cached_property
    def words(self) -> np.ndarray:
        """(d,) int64: words of each row."""
        return np.diff(self.firsts)

    @cached_property
    def length(self) -> np.ndarray:
        """(d,) int64: characters of each row."""
        return self.characters(self.offsets[:-1], self.offsets[1:])

    @cached_property
    def _following(self) -> np.ndarray:
        """(f,) int64: the bytes of characters that are not their first."""
        return np.flatnonzero((self.data & 0xC0) == 0x80)

    def characters(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Count the characters of spans of bytes: (k,) int64."""
        sizes: np.ndarray = ends - starts
        if len(self._following):
            sizes -= np.searchsorted(self._following, ends)
            sizes += np.searchsorted(self._following, starts)
        return sizes

    def per_row(self, positions: np.ndarray) -> np.ndarray:
        """Count ascending positions of bytes in each row: (d,) int64."""
        return np.diff(np.searchsorted(positions, self.offsets))

    def sum_words(self, values: np.ndarray) -> np.ndarray:
        """Add up a value of each word: (w,) integers or bool -> (d,) int64."""
        sums = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum(values, out=sums[1:])
        return np.diff(sums[self.firsts])

    def sum_spans(self, spans: Spans, values: np.ndarray) -> np.ndarray:
        """Add up a value of each span: (k,) integers or bool -> (d,) int64."""
        total: np.ndarray = np.bincount(spans.rows, values, self.rows).astype(np.int64)
        return total

    def positions(self, text: str) -> np.ndarray:
        """Return where a character of the BMP begins: ascending int64."""
        first, *others = text.encode()
        found = np.flatnonzero(self.data == first)
        for i, byte in enumerate(others, 1):
            found = found[found + i < len(self.data)]
            found = found[self.data[found + i] == byte]
        return found

    def runs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the starts and ends of runs of consecutive positions within a row."""
        if not len(positions):
            return positions, positions
        new = np.ones(len(positions), dtype=bool)
        new[1:] = np.diff(positions) > 1
        at = np.searchsorted(positions, self.offsets[1:-1])
        new[at[at < len(positions)]] = True
        starts = np.flatnonzero(new)
        return positions[starts], positions[np.append(starts[1:], len(positions)) - 1] + 1

    def split(
        self,
        starts: np.ndarray,
        ends: np.ndarray,
        bounds: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Spans:
        """Split each row at separators, as ``str.split`` does: one span more than separators.

        Args:
            starts: First byte of each separator, ascending.
            ends: One past its last byte.
            bounds: (d,) int64 each: the parts of the rows to split; None: whole rows.
        """
        begin, end = bounds or (self.offsets[:-1], self.offsets[1:])
        counts = np.searchsorted(starts, end) - np.searchsorted(starts, begin) + 1
        last = np.cumsum(counts) - 1
        first = last - counts + 1
        rows = np.repeat(np.arange(self.rows), counts)
        span_starts, span_ends = np.empty_like(rows), np.empty_like(rows)
        inner = np.ones(len(rows), dtype=bool)
        inner[first] = False
        span_starts[first], span_starts[inner] = begin, ends
        inner[first], inner[last] = True, False
        span_ends[last], span_ends[inner] = end, starts
        return Spans(span_starts, span_ends, rows)

    @cached_property
    def lines(self) -> Spans:
        """The lines as ``str.splitlines`` finds them: without an empty one at the end."""
        data = self.data
        control = (data >= 10) & (data <= 13) | (data >= 28) & (data <= 30)
        starts = np.flatnonzero(control)
        sizes = np.ones(len(starts), dtype=np.int64)
        pair = np.flatnonzero((data[starts[:-1]] == 13) & (data[starts[1:]] == NEWLINE))
        pair = pair[starts[pair] + 1 == starts[pair + 1]]
        pair = pair[~np.isin(starts[pair + 1], self.offsets)]
        sizes[pair] = 2
        starts, sizes = np.delete(starts, pair + 1), np.delete(sizes, pair + 1)
        for text in ("\x85", "\u2028", "\u2029") if len(self._following) else ():
            more = self.positions(text)
            starts = np.append(starts, more)
            sizes = np.append(sizes, np.full(len(more), len(text.encode())))
        order = np.argsort(starts, kind="stable")
        spans = self.split(starts[order], (starts + sizes)[order])
        empty_last = (spans.starts == spans.ends) & (spans.ends == self.offsets[1:][spans.rows])
        return spans.where(~empty_last)

    def stripped(self, spans: Spans) -> tuple[Spans, np.ndarray]:
        """Return spans without white space at their ends, and which have anything else.

        Returns:
            The spans, (k,) of them, and (k,) bool. A blank span is empty, at its old start.
        """
        if not len(self.starts):
            return Spans(spans.starts, spans.starts, spans.rows), np.zeros(len(spans.rows), bool)
        first = np.searchsorted(self.starts, spans.starts)
        last = np.searchsorted(self.ends, spans.ends, side="right") - 1
        filled = first <= last
        starts = np.where(
            filled, self.starts[np.minimum(first, len(self.starts) - 1)], spans.starts
        )
        ends = np.where(filled, self.ends.take(last, mode="clip"), spans.starts)
        return Spans(starts, ends, spans.rows), filled

    def ends_with(self, ends: np.ndarray, starts: np.ndarray, text: bytes) -> np.ndarray:
        """Tell which spans of bytes end with a text: (k,) bool."""
        long_enough: np.ndarray = ends - starts >= len(text)
        for i, byte in enumerate(reversed(text), 1):
            long_enough &= self.data[np.maximum(ends - i, 0)] == byte
        return long_enough

    def repeated(self, spans: Spans) -> np.ndarray:
        """Tell which spans are equal to an earlier one of their row: (k,) bool."""
        hashes = span_hashes(self.data, spans.starts, spans.ends)
        order = np.lexsort((hashes, spans.rows))
        same = (np.diff(hashes[order]) == 0) & (np.diff(spans.rows[order]) == 0)
        found = np.zeros(len(order), dtype=bool)
        found[order[1:]] = same
        return found
