"""Counts for the quality rules of Gopher and of FineWeb, and for C4's."""

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.curate.characters import CLASS, LETTER, SPACE, SYMBOL, TERMINAL
from pipeline.curate.hashing import span_hashes
from pipeline.curate.surface import NEWLINE, Spans, Surface
from pipeline.curate.words import lower_case

Counts = dict[str, np.ndarray]
"""(d,) int64 of each name."""

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Gopher: at least two of them are in a document of English."""
_POLICY = (
    b"terms of use",
    b"privacy policy",
    b"cookie policy",
    b"uses cookies",
    b"use of cookies",
    b"use cookies",
)
_CITATIONS = re.compile(rb"(\[\d*]|\[edit]|\[citation needed])+$")


class Limits(NamedTuple):
    """Limits inside the counts: a changed one reads the text again."""

    short_line: int = 30
    """FineWeb: a line of up to so many characters is short."""
    line_words: int = 3
    """C4: a line of fewer words is removed."""
    word_length: int = 1000
    """C4: a line with a word of more characters is removed."""


def gopher_quality(surface: Surface) -> Counts:
    """Count what Gopher's quality rules compare (Rae et al., 2021, appendix A.1.1).

    As in datatrove, words of symbols alone are left out of the number and length of words, but not
    where hashes, ellipses and words with a letter are related to the number of words.
    """
    codes, starts = surface.codes, surface.starts
    classes = codes & CLASS
    # The class of a plain character, 0 of any other: letters have the highest, and are all plain.
    plain = np.where((codes & SYMBOL) == 0, classes, 0)
    highest = np.maximum.reduceat(plain, starts) if len(starts) else plain[:0]
    plain_word, alpha = highest > 0, highest >= LETTER
    dots, dot_ends = surface.runs(surface.positions("."))
    triples = (dot_ends - dots) // 3
    in_row = np.searchsorted(surface.offsets, dots, side="right") - 1
    ellipses = surface.sum_spans(Spans(dots, dot_ends, in_row), triples)
    lines = surface.lines
    bare, filled = surface.stripped(lines)
    first = surface.data[np.minimum(bare.starts, max(len(surface.data) - 1, 0))]
    bullet = filled & (first == ord("-"))
    bullet |= np.isin(bare.starts, surface.positions("•")) & filled
    ellipsis = surface.ends_with(bare.ends, bare.starts, b"...")
    ellipsis |= surface.ends_with(bare.ends, bare.starts, "…".encode())
    return {
        "words": surface.words,
        "plain_words": surface.sum_words(plain_word),
        "plain_word_chars": surface.sum_words(np.where(plain_word, surface.sizes, 0)),
        "alpha_words": surface.sum_words(alpha),
        "hashes": surface.per_row(surface.positions("#")),
        "ellipses": ellipses + surface.per_row(surface.positions("…")),
        "lines": np.bincount(lines.rows, minlength=surface.rows),
        "bullet_lines": surface.sum_spans(lines, bullet),
        "ellipsis_lines": surface.sum_spans(lines, ellipsis),
        "stop_words": _stop_words(surface),
    }


def _stop_words(surface: Surface) -> np.ndarray:
    """Count the different stop words of each row."""
    sizes = surface.ends - surface.starts
    short = np.flatnonzero((sizes >= 2) & (sizes <= 4))  # as all stop words
    hashes = span_hashes(surface.data, surface.starts[short], surface.ends[short])
    firsts = np.searchsorted(short, surface.firsts)
    found = np.zeros(surface.rows, dtype=np.int64)
    for wanted in _stop_word_hashes():
        at = np.flatnonzero(hashes == wanted)
        found += np.diff(np.searchsorted(at, firsts)) > 0
    return found


@lru_cache(1)
def _stop_word_hashes() -> np.ndarray:
    ends = np.cumsum([len(word) for word in STOP_WORDS])
    starts = np.concatenate([[0], ends[:-1]])
    return span_hashes(np.frombuffer("".join(STOP_WORDS).encode(), dtype=np.uint8), starts, ends)


def fineweb(surface: Surface, limits: Limits) -> Counts:
    """Count what FineWeb's own rules compare (Penedo et al., 2024): lines that are not blank."""
    newlines = np.flatnonzero(surface.data == NEWLINE)
    every = surface.split(newlines, newlines + 1)
    _, filled = surface.stripped(every)
    lines = every.where(filled)
    sizes = surface.characters(lines.starts, lines.ends)
    terminal = (surface.codes[lines.ends - 1] & TERMINAL) != 0
    return {
        "words": surface.words,
        "newlines": surface.per_row(newlines),
        "text_chars": surface.length - surface.per_row(newlines),
        "filled_lines": np.bincount(lines.rows, minlength=surface.rows),
        "terminal_lines": surface.sum_spans(lines, terminal),
        "short_lines": surface.sum_spans(lines, sizes <= limits.short_line),
        "repeated_chars": surface.sum_spans(lines, np.where(surface.repeated(lines), sizes, 0)),
    }


def c4(surface: Surface, limits: Limits) -> Counts:
    """Count what C4's rules compare (Raffel et al., 2020), as if its lines had been removed.

    A line is removed if it has a very long word, does not end with ``. ? ! " '``, ends with an
    ellipsis, has under three words, or names javascript or a policy. A citation as in Wikipedia at
    its end is ignored. In the lines left, sentences are counted: a word that ends with ``. ? !``
    (and quotes or brackets) ends one, unless the next begins with a small letter; a line has at
    least one.
    """
    data = surface.data
    lower = lower_case(data)
    lines, filled = surface.stripped(surface.lines)
    lines = lines.where(filled)
    word, word_ends = _spaced_words(surface)
    first = np.searchsorted(word, lines.starts)
    last = np.searchsorted(word, lines.ends)  # one past the line's last word
    too_long = np.flatnonzero(surface.characters(word, word_ends) > limits.word_length)
    bad = np.searchsorted(too_long, last) > np.searchsorted(too_long, first)
    ends = lines.ends.copy()
    for i in np.flatnonzero(data[lines.ends - 1] == ord("]")).tolist():
        line = data[lines.starts[i] : lines.ends[i]].tobytes()
        ends[i] = lines.starts[i] + len(_CITATIONS.sub(b"", line))
    final = data[np.maximum(ends - 1, 0)]
    bad |= ~np.isin(final, np.frombuffer(b".?!\"'", dtype=np.uint8)) | (ends <= lines.starts)
    bad |= surface.ends_with(ends, lines.starts, b"...")
    bad |= last - first < limits.line_words
    lorem = ~bad & _mentions(lower, lines, (b"lorem ipsum",))
    bad |= _mentions(lower, lines, (b"javascript",))
    braces = ~bad & _mentions(lower, lines, (b"{",))
    bad |= _mentions(lower, lines, _POLICY)
    sentences = np.maximum(_sentence_ends(surface, lines, word, word_ends, first, last), 1)
    return {
        "lorem_ipsum": surface.sum_spans(lines, lorem),
        "curly_brackets": surface.sum_spans(lines, braces),
        "sentences": surface.sum_spans(lines, np.where(bad, 0, sentences)),
    }


def _spaced_words(surface: Surface) -> tuple[np.ndarray, np.ndarray]:
    """Return the first byte of each run without white space, and one past its last, in a row."""
    inside = np.zeros(len(surface.data) + 1, dtype=bool)
    inside[:-1] = (surface.codes & CLASS) != SPACE
    begins = np.zeros(len(inside), dtype=bool)
    begins[surface.offsets] = True
    starts = inside.copy()
    starts[1:] &= ~inside[:-1] | begins[1:]
    ends = inside[:-1] & (~inside[1:] | begins[1:])
    return np.flatnonzero(starts), np.flatnonzero(ends) + 1


def _mentions(lower: np.ndarray, lines: Spans, texts: tuple[bytes, ...]) -> np.ndarray:
    """Tell which lines hold one of the texts: (k,) bool."""
    found, data = np.zeros(len(lines.starts), dtype=bool), lower.tobytes()
    for text in texts:
        at = data.find(text)
        while at >= 0:
            line = int(np.searchsorted(lines.starts, at, side="right")) - 1
            if line >= 0 and at + len(text) <= lines.ends[line]:
                found[line] = True
            at = data.find(text, at + 1)
    return found


def _sentence_ends(
    surface: Surface,
    lines: Spans,
    word: np.ndarray,
    word_ends: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
) -> np.ndarray:
    """Count the words of each line that end a sentence: (k,) int64."""
    data = surface.data
    at = word_ends - 1
    for _ in range(2):  # closing quotes and brackets
        closing = np.isin(data[at], np.frombuffer(b"\"')]", dtype=np.uint8)) & (at > word)
        at = at - closing
    ending = np.isin(data[at], np.frombuffer(b".?!", dtype=np.uint8))
    small = np.zeros(len(word), dtype=bool)
    small[:-1] = (data[word[1:]] >= ord("a")) & (data[word[1:]] <= ord("z"))
    small[last[last > 0] - 1] = False  # the next word is in another line
    ends = np.zeros(len(word) + 1, dtype=np.int64)
    np.cumsum(ending & ~small, out=ends[1:])
    counted: np.ndarray = ends[last] - ends[first]
    return counted
