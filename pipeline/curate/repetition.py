"""Counts for Gopher's repetition rules (Rae et al., 2021, table A1): lines, paragraphs, n-grams.

The duplicate n-gram rules are a greedy walk over the words of a document: at an n-gram that it has
met, the walk counts its characters and goes n words on, else one word. A word where no repeated
n-gram starts cannot change the walk. So the repeated 2-grams are found by sorting, among them the
repeated 3-grams, and so on, and only the few words that are left are walked in Python.
"""

import numpy as np

from pipeline.curate.hashing import ODD, mix64
from pipeline.curate.surface import NEWLINE, Spans, Surface

TOP = (2, 3, 4)
"""Lengths of n-grams of which the most frequent is measured."""
GREEDY = (5, 6, 7, 8, 9, 10)
"""Lengths of n-grams whose repetitions are measured."""


def gopher_repetition(surface: Surface) -> dict[str, np.ndarray]:
    """Count what Gopher's repetition rules compare: (d,) int64 of each name.

    ``top_n_chars`` is the number of the most frequent n-gram times its characters, single spaces
    between words included; of several the first counts, as in datatrove. ``repeated_n_chars`` are
    the characters of repeated n-grams without spaces, each counted once.
    """
    newline = np.flatnonzero(surface.data == NEWLINE)
    starts, ends = surface.runs(newline)
    rows = Spans(surface.offsets[:-1], surface.offsets[1:], np.arange(surface.rows))
    bare, _ = surface.stripped(rows)
    empty = bare.starts == bare.ends  # searched like any row: at no byte there is no separator
    wide = ends - starts > 1
    inner = _inside(starts[wide], bare, empty)
    counts = {
        "chars": surface.length,
        **_repeats(surface, "line", surface.split(starts, ends)),
        **_repeats(
            surface,
            "paragraph",
            surface.split(starts[wide][inner], ends[wide][inner], (bare.starts, bare.ends)),
        ),
    }
    return counts | _grams(surface)


def _inside(positions: np.ndarray, spans: Spans, empty: np.ndarray) -> np.ndarray:
    """Tell which positions lie within the span of their row: (k,) bool."""
    row = np.searchsorted(spans.starts[~empty], positions, side="right") - 1
    ends = spans.ends[~empty]
    return (row >= 0) & (positions < ends[np.maximum(row, 0)]) if len(ends) else row > len(row)


def _repeats(surface: Surface, name: str, spans: Spans) -> dict[str, np.ndarray]:
    repeated = surface.repeated(spans)
    sizes = surface.characters(spans.starts, spans.ends)
    return {
        f"{name}s_split": np.bincount(spans.rows, minlength=surface.rows),
        f"repeated_{name}s": surface.sum_spans(spans, repeated),
        f"repeated_{name}_chars": surface.sum_spans(spans, np.where(repeated, sizes, 0)),
    }


def _grams(surface: Surface) -> dict[str, np.ndarray]:
    before = np.zeros(len(surface.sizes) + 1, dtype=np.int64)  # characters before each word
    np.cumsum(surface.sizes, out=before[1:])
    word_rows = np.repeat(np.arange(surface.rows), surface.words)
    room = surface.firsts[1:][word_rows] - np.arange(len(word_rows))  # words left in the row
    at = np.arange(len(word_rows))  # where an n-gram begins that may be repeated
    grams = mix64(surface.hashes + word_rows.astype(np.uint64) * ODD)  # of at: never in two rows
    counts: dict[str, np.ndarray] = {}
    for n in range(2, GREEDY[-1] + 1):
        fits = room[at] >= n
        at, grams = at[fits], grams[fits]
        grams = mix64(grams * ODD + surface.hashes[at + n - 1])
        order = np.argsort(grams)
        new = np.ones(len(order) + 1, dtype=bool)
        new[1:-1] = np.diff(grams[order]) != 0
        repeated = ~(new[:-1] & new[1:])
        order, group = order[repeated], np.cumsum(new[:-1])[repeated]
        back = np.argsort(order)  # in the order of words again
        order, group = order[back], group[back]
        at, grams = at[order], grams[order]
        if n in TOP:
            counts[f"top_{n}_chars"] = _top(surface, before, word_rows, at, group, n)
        else:
            taken = _walk(at.tolist(), group.tolist(), n)
            sizes = before[taken + n] - before[taken]
            counts[f"repeated_{n}_chars"] = np.bincount(
                word_rows[taken], sizes, surface.rows
            ).astype(np.int64)
    return counts


def _top(
    surface: Surface,
    before: np.ndarray,
    word_rows: np.ndarray,
    at: np.ndarray,
    group: np.ndarray,
    n: int,
) -> np.ndarray:
    """Return the count of each row's most frequent n-gram times its characters."""
    where = surface.firsts[:-1].copy()  # if none is repeated, the first n-gram, once
    times = (surface.words >= n).astype(np.int64)
    where[times == 0] = 0
    _, first, number = np.unique(group, return_index=True, return_counts=True)
    rows = word_rows[at[first]]
    best = np.lexsort((at[first], -number, rows))
    best = best[np.diff(rows[best], prepend=-1) > 0]
    where[rows[best]], times[rows[best]] = at[first[best]], number[best]
    if not len(word_rows):
        return times
    ends = np.minimum(where + n, len(before) - 1)
    sizes: np.ndarray = before[ends] - before[where] + n - 1
    return sizes * times


def _walk(at: list[int], group: list[int], n: int) -> np.ndarray:
    """Return the words at which the greedy walk meets an n-gram again."""
    met: set[int] = set()
    taken, free = [], 0
    for word, number in zip(at, group, strict=True):
        if word < free:
            continue
        if number in met:
            taken.append(word)
            free = word + n
        else:
            met.add(number)
    return np.array(taken, dtype=np.int64)
