r"""The word splitter, version 1: words as spans of bytes, found for many documents at once.

There are two kinds of word, each for its purpose; both depend on the frozen `characters` alone.

*Plain words* are for comparing texts (signatures, n-grams): a longest run of letters, digits and
combining marks. Everything else separates, ASCII case is ignored, and each ideograph or kana is a
word of its own. "It's 3.5 %" has the plain words it, s, 3, 5. Capitals beyond ASCII keep their
case. Languages written without spaces, but for Chinese and Japanese, have very long words.

*Surface words* are for the quality heuristics, whose thresholds were tuned on the words of spaCy's
English tokenizer (datatrove) and count punctuation. White space separates, and within a run:

- a letter, digit or combining mark belongs to the word before it; each ideograph is a word;
- a full stop joins its neighbours ("3.14", "U.S", "gpt2.py"), but not lower before upper case; it
  ends the word after a single letter ("J.", "U.S.", "e.g.") and after `ABBREVIATIONS` ("Mr.");
- a comma joins two digits; a colon or slash joins if a digit follows; a hyphen joins a letter and a
  digit; ``@``, ``_`` and ``&`` join;
- an apostrophe between word characters begins a word ("don" "'t");
- any other mark is a word of its own, and so is a run of one of ``. - / ~ ^ | \``.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate import characters
from pipeline.curate.characters import APOSTROPHE, DIGIT, JOINING, LETTER, RUN, SPACE, UPPER, WORD
from pipeline.curate.hashing import span_hashes

VERSION = 1
"""Raised by any change of the words or their hashes."""
PIECE = 1 << 18
"""Bytes of text that are processed at a time: the arrays of a piece fit a core's cache."""
LONG = 1 << 22
"""A document longer than this, in bytes, is cut between words where its reader allows it."""


ABBREVIATIONS = (
    "Adm Apr Ariz Ark Aug Bros Calif Co Colo Conn Corp Dec Del Dr Feb Fla Ga Gen Gov Ia Id Ill Inc "
    "Ind Jan Jr Jul Jun Kan Kans Ky La Ltd Mar Mass Md Messrs Mich Minn Miss Mo Mont Mr Mrs Ms Mt "
    "Neb Nebr Nev No Nov Oct Okla Ore Pa Ph Prof Rep Rev Sen Sep Sept St Tenn Va Wash Wis co vs"
)
"""Words that keep their full stop, of 2 to 6 letters: those of spaCy's English."""


class Texts(NamedTuple):
    """The documents of a batch, in valid UTF-8: a broken character could reach into a next row."""

    data: np.ndarray
    """(n,) uint8."""
    offsets: np.ndarray
    """(d + 1,) int64: row i is ``data[offsets[i] : offsets[i + 1]]``. The first is 0."""


class Words(NamedTuple):
    """The words of a batch, in order."""

    starts: np.ndarray
    """(w,) int64: first byte of each word in `Texts.data`."""
    ends: np.ndarray
    """(w,) int64: one past its last byte."""
    hashes: np.ndarray
    """(w,) uint64: equal for equal words."""
    firsts: np.ndarray
    """(d + 1,) int64: row i has the words ``firsts[i]`` to ``firsts[i + 1]``."""


class Piece(NamedTuple):
    """A part of a batch: whole rows, or a part of one long row."""

    first_row: int
    """Row of the batch that is row 0 of `texts`."""
    texts: Texts
    continued: bool
    """Whether row 0 continues the last row of the piece before."""


def as_texts(column: pa.Array | pa.ChunkedArray) -> Texts:
    """View a column of strings or bytes in any of Arrow's layouts; null becomes empty."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    column = column.cast(pa.large_binary())
    if column.null_count:
        column = pc.fill_null(column, b"")
    if not len(column):
        return Texts(np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64))
    _, offsets, data = column.buffers()
    window = slice(column.offset, column.offset + len(column) + 1)
    bounds = np.frombuffer(offsets, dtype=np.int64)[window]
    if data is None:
        return Texts(np.zeros(0, dtype=np.uint8), np.zeros_like(bounds))
    return Texts(np.frombuffer(data, dtype=np.uint8)[bounds[0] : bounds[-1]], bounds - bounds[0])


def pieces(texts: Texts, cut_long: bool = False) -> Iterator[Piece]:
    """Cut a batch into pieces of about `PIECE` bytes.

    Args:
        texts: The batch.
        cut_long: Whether to cut rows longer than `LONG` as well, after the last space or line end
            of each `LONG` bytes; where there is none, between characters. A cut depends on its row
            alone.
    """
    data, offsets = texts
    row, rows = 0, len(offsets) - 1
    while row < rows:
        begin = int(offsets[row])
        if cut_long and offsets[row + 1] - begin > LONG:
            yield from _parts(row, data[begin : offsets[row + 1]])
            row += 1
            continue
        stop = int(np.searchsorted(offsets, begin + PIECE, side="right")) - 1
        stop = min(max(stop, row + 1), rows)
        if cut_long:
            longer = np.flatnonzero(np.diff(offsets[row : stop + 1]) > LONG)
            stop = row + int(longer[0]) if len(longer) else stop
        bounds = offsets[row : stop + 1]
        yield Piece(row, Texts(data[begin : bounds[-1]], bounds - begin), False)
        row = stop


def _parts(row: int, data: np.ndarray) -> Iterator[Piece]:
    first = 0
    while first < len(data):
        stop = first + LONG
        if stop < len(data):
            part = data[first:stop]
            spaces = np.flatnonzero((part == ord(" ")) | (part == ord("\n")))
            if len(spaces):
                stop = first + int(spaces[-1]) + 1
            else:  # before a character
                stop -= int(np.argmax((data[stop - 3 : stop + 1][::-1] & 0xC0) != 0x80))
        part = data[first:stop]
        yield Piece(row, Texts(part, np.array([0, len(part)])), first > 0)
        first += len(part)


def plain_words(texts: Texts) -> Words:
    """Find the words that texts are compared by; see above."""
    data, offsets = texts
    classes = characters.byte_codes(data) & characters.CLASS
    inside = classes >= WORD
    before = np.empty_like(inside)
    before[:1], before[1:] = False, inside[:-1]
    first = row_starts(texts)
    before[first] = False
    alone = classes == characters.IDEOGRAPH
    if alone.any():
        alone[1:] |= alone[:-1]
        before &= ~(alone & ((data & 0xC0) != 0x80))
    starts = np.flatnonzero(inside & ~before)
    after = np.empty_like(inside)
    after[-1:], after[:-1] = True, ~inside[1:]
    after[first[first > 0] - 1] = True
    if alone.any():
        after[starts[starts > 0] - 1] = True
    ends = np.flatnonzero(inside & after) + 1
    hashes = span_hashes(lower_case(data), starts, ends)
    return Words(starts, ends, hashes, np.searchsorted(starts, offsets))


class PlainPiece(NamedTuple):
    """The plain words of whole rows, or of a part of a long one."""

    first_row: int
    """Row of the batch that is row 0 here."""
    hashes: np.ndarray
    """(w,) uint64."""
    firsts: np.ndarray
    """(d + 1,) int64: row i has the words ``firsts[i]`` to ``firsts[i + 1]``."""
    overlap: int
    """First words that are the last of the piece before, of the same row."""


def plain_pieces(texts: Texts, overlap: int) -> Iterator[PlainPiece]:
    """Yield the plain words of a batch, piece by piece.

    Args:
        texts: The batch.
        overlap: Words of a long row that the next part of it begins with again, if it has so many:
            with n - 1, every run of n words is in exactly one piece.
    """
    tail = np.zeros(0, dtype=np.uint64)
    for piece in pieces(texts, cut_long=True):
        words = plain_words(piece.texts)
        if not piece.continued:
            hashes, firsts, repeated = words.hashes, words.firsts, 0
        else:
            hashes, repeated = np.concatenate([tail, words.hashes]), len(tail)
            firsts = np.array([0, len(hashes)])
        last_row = hashes[firsts[-2] :]
        tail = last_row[max(len(last_row) - overlap, 0) :]
        yield PlainPiece(piece.first_row, hashes, firsts, repeated)


def surface_words(texts: Texts) -> Words:
    """Find the words that the heuristics count; see above."""
    starts, ends = surface_spans(texts, characters.byte_codes(texts.data))
    hashes = span_hashes(texts.data, starts, ends)
    return Words(starts, ends, hashes, np.searchsorted(starts, texts.offsets))


def surface_spans(texts: Texts, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first byte of each surface word, and one past its last: (w,) int64 each.

    Args:
        texts: The batch.
        codes: `characters.byte_codes` of its data.
    """
    data, first = texts.data, row_starts(texts)
    classes = codes & characters.CLASS
    inside = classes >= WORD  # part of a word that is longer than a mark
    begins = np.zeros(len(data) + 1, dtype=bool)  # a row, or a word after an apostrophe
    begins[first], begins[-1] = True, True
    _join(data, classes, inside, begins)
    before = np.empty_like(inside)
    before[:1], before[1:] = False, inside[:-1]
    starts = ~(inside & before)
    starts &= classes != SPACE
    lead = (data & 0xC0) != 0x80
    starts &= lead | (inside & ~before)
    run = np.flatnonzero((classes == RUN) | ((data >= ord("-")) & (data <= ord("/"))))
    run = run[run > 0]
    run = run[(data[run] == data[run - 1]) & ~inside[run] & ~inside[run - 1]]
    starts[run] = False
    alone = classes == characters.IDEOGRAPH
    if alone.any():
        alone[1:] |= alone[:-1]
        starts |= alone & lead & (classes != SPACE)
    starts |= begins[:-1] & (classes != SPACE)
    begin = np.flatnonzero(starts)
    space = np.empty_like(inside)
    space[-1:], space[:-1] = True, starts[1:] | (classes[1:] == SPACE) | begins[1:-1]
    return begin, np.flatnonzero(space & (classes != SPACE)) + 1


def _join(data: np.ndarray, classes: np.ndarray, inside: np.ndarray, begins: np.ndarray) -> None:
    """Mark in ``inside`` the punctuation that belongs to words, in ``begins`` where it begins one.

    Args:
        data: (n,) uint8.
        classes: (n,) uint8.
        inside: (n,) bool, changed.
        begins: (n + 1,) bool, changed; True at the first byte of a row and at the end.
    """
    at = np.flatnonzero(classes == JOINING)
    at = at[~begins[at]]
    at = at[classes[at - 1] >= WORD]  # before it, in the same row, is a part of a word
    last = classes[at - 1]
    final = begins[at + 1]
    following = classes[np.minimum(at + 1, len(data) - 1)]
    following[final] = SPACE
    mark = data[at]
    digits = (last == DIGIT, following == DIGIT)
    letters = (last >= LETTER, following >= LETTER)
    point = mark == ord(".")
    joins = (following >= WORD) & (
        (point & ~((last == LETTER) & (following == UPPER)))
        | ((mark == ord(",")) & digits[0] & digits[1])
        | (((mark == ord(":")) | (mark == ord("/"))) & digits[1])
        | ((mark == ord("-")) & ~(letters[0] & letters[1]) & ~(digits[0] & digits[1]))
        | (mark >= ord("@"))
        | (mark == ord("&"))
    )
    inside[at[joins]] = True
    final_points = at[point & (last >= LETTER) & ~joins]
    inside[final_points[_abbreviated(data, classes, begins, final_points)]] = True

    at = np.flatnonzero(classes == APOSTROPHE)
    at = at[(data[at] & 0xC0) != 0x80]
    at = at[~begins[at]]
    at = at[classes[at - 1] >= WORD]
    size = np.where(data[at] < 0x80, 1, 3)
    within = at + size < len(data)
    at, size = at[within], size[within]
    between = ~begins[at + size] & (classes[at + size] >= WORD)
    at, size = at[between], size[between]
    for i in range(3):
        inside[at[size > i] + i] = True
    begins[at] = True


def _abbreviated(
    data: np.ndarray, classes: np.ndarray, begins: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """Tell which full stops end an abbreviation: (k,) bool."""
    padded = np.concatenate([np.zeros(8, dtype=np.uint8), data])
    eight = np.ndarray((len(data) + 1,), dtype="<u8", buffer=padded, strides=(1,))[at]
    found = np.zeros(len(at), dtype=bool)
    for size, numbers in _abbreviation_numbers().items():
        first = at - size
        alone = first >= 0
        first = np.maximum(first, 0)
        alone &= begins[first] | (classes[first - 1] < WORD)
        found |= alone & (np.isin(eight >> np.uint64(64 - 8 * size), numbers) | (size == 1))
    return found


@lru_cache(1)
def _abbreviation_numbers() -> dict[int, np.ndarray]:
    """Return the abbreviations as little-endian numbers, by length; of length 1 any letter is."""
    numbers: dict[int, list[int]] = {1: []}
    for word in ABBREVIATIONS.split():
        numbers.setdefault(len(word), []).append(int.from_bytes(word.encode(), "little"))
    return {size: np.array(found, dtype=np.uint64) for size, found in numbers.items()}


def lower_case(data: np.ndarray) -> np.ndarray:
    """Replace each ASCII capital by its small letter: (n,) uint8."""
    return np.frombuffer(data.tobytes().lower(), dtype=np.uint8)


def row_starts(texts: Texts) -> np.ndarray:
    """Return the first byte of each row that is not empty: ascending int64."""
    return texts.offsets[:-1][np.diff(texts.offsets) > 0]
