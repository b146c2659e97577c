"""Find texts of evaluation tasks in the documents, by the runs of words that they have in common.

As in GPT-3 (Brown et al., 2020, appendix C), an n-gram is 13 words, without punctuation, white
space and case (`words.plain_words`), and one in common is enough. A task of 8 to 12 words is found
by all its words in a row; a shorter one would be found everywhere, and is reported as not
checkable.
Unlike GPT-3, n-grams that are in many documents are not left out.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.curate.hashing import gram_hashes
from pipeline.curate.words import Texts, as_texts, plain_pieces, plain_words
from pipeline.runtime.errors import UserError, printable
from pipeline.store import atomic

NGRAM, LEAST = 13, 8
"""Words of an n-gram, and of the shortest task that can be checked."""
_MARKUP = re.compile(r"\[[a-z]+\]")
"""WikiHow's headings and steps in HellaSwag, such as [header], which are in no original."""


class Item(NamedTuple):
    """A task of an evaluation."""

    name: str
    """Such as hellaswag_val.jsonl/17: the file, and the line in it from 0."""
    text: str
    """What a document must not contain: the question with its right answer."""


class Found(NamedTuple):
    """Rows that have n-grams in common with items: ascending rows, and items within a row."""

    rows: np.ndarray
    """(f,) int64: row in the batch."""
    items: np.ndarray
    """(f,) int64: index in `Index.items`."""
    counts: np.ndarray
    """(f,) int64: places in the row where an n-gram of the item begins."""


class Grams(NamedTuple):
    """The n-grams of one length."""

    n: int
    """Words of each."""
    hashes: np.ndarray
    """(g,) uint64, ascending; one that is in several items is there several times."""
    items: np.ndarray
    """(g,) int64: index of its item."""


class Index:
    """The n-grams of a set of items; goes to other processes by pickle."""

    def __init__(self, items: list[str], short: list[str], grams: list[Grams]) -> None:
        self.items = items
        """Names of the items that are checked."""
        self.short = short
        """Names of the items that have too few words."""
        self.grams = grams

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides what is found."""
        parts = [repr(self.items).encode()]
        for n, hashes, items in self.grams:
            parts += [str(n).encode(), hashes.tobytes(), items.tobytes()]
        return hashlib.sha256(b"\n".join(parts)).hexdigest()

    @cached_property
    def _maps(self) -> list[tuple[np.ndarray, np.uint64]]:
        """For each length, which first bits of a hash any n-gram has, and the bits to shift."""
        maps = []
        for grams in self.grams:
            bits = max(16, len(grams.hashes).bit_length() + 4)  # one place in 16 is taken, at most
            shift = np.uint64(64 - bits)
            taken = np.zeros(1 << bits, dtype=bool)
            taken[grams.hashes >> shift] = True
            maps.append((taken, shift))
        return maps

    def among(self, number: int, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes may be n-grams of length ``grams[number].n``: ascending indices."""
        taken, shift = self._maps[number]
        return np.flatnonzero(taken[hashes >> shift])


def read_items(name: str, path: Path) -> list[Item]:
    """Read the tasks of an evaluation from a file of JSON lines.

    A line of HellaSwag has ``ctx``, ``endings`` and ``label``; one of LAMBADA, and of your own
    files, ``text``.

    Raises:
        UserError: The file cannot be read, or a line is neither; names file and line.
    """
    shown = printable(str(path))
    try:
        lines = io.StringIO(atomic.read_bytes(path).decode(), newline=None)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; name a .jsonl file") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: not UTF-8; use another file") from None
    except ValueError as error:  # of the path
        raise UserError(f"{shown}: {error}; name a .jsonl file") from None
    items = []
    for number, line in enumerate(lines):
        try:
            items.append(Item(f"{name}/{number}", _text(atomic.parse_json(line))))
        except (LookupError, TypeError, ValueError, OverflowError):
            raise UserError(
                f"{shown}: line {number + 1} is not a task: it needs text, or ctx, endings and "
                "label; use another file"
            ) from None
    if not items:
        raise UserError(f"{shown}: has no tasks; use another file")
    return items


def _text(row: Mapping[str, Any]) -> str:
    if "endings" in row:
        label = int(row["label"])
        if label < 0:
            raise ValueError(label)
        text = _MARKUP.sub(" ", f"{row['ctx']} {row['endings'][label]}")
    else:
        text = row["text"]
    if not isinstance(text, str):
        raise TypeError("text")
    text.encode()  # JSON can hold half of a surrogate pair
    return text


def index(items: Sequence[Item], ngram: int = NGRAM, least: int = LEAST) -> Index:
    """Index the n-grams of items.

    Args:
        items: The tasks.
        ngram: Words of an n-gram.
        least: Words of the shortest item that is checked.
    """
    texts = as_texts(pa.array([item.text for item in items], pa.large_string()))
    words = plain_words(texts)
    counts = np.diff(words.firsts)
    checked = np.flatnonzero(counts >= least)
    grams = []
    for n in np.unique(np.minimum(counts[checked], ngram)).tolist():
        hashes, owners = [], []
        for number, row in enumerate(checked.tolist()):
            if min(counts[row], ngram) == n:
                found = np.unique(
                    gram_hashes(words.hashes[words.firsts[row] : words.firsts[row + 1]], n)
                )
                hashes.append(found)
                owners.append(np.full(len(found), number))
        flat, owner = np.concatenate(hashes), np.concatenate(owners)
        order = np.lexsort((owner, flat))
        grams.append(Grams(n, flat[order], owner[order]))
    return Index(
        [items[row].name for row in checked.tolist()],
        [items[row].name for row in np.flatnonzero(counts < least).tolist()],
        grams,
    )


def find(texts: Texts, index: Index) -> Found:
    """Find the rows of a batch that have an n-gram in common with an item."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    overlap = max((grams.n for grams in index.grams), default=1) - 1
    for piece in plain_pieces(texts, overlap):
        for number, grams in enumerate(index.grams):
            hashes = gram_hashes(piece.hashes, grams.n)
            at = index.among(number, hashes)
            rows = np.searchsorted(piece.firsts, at, side="right") - 1
            whole = at + grams.n <= piece.firsts[rows + 1]
            whole &= at >= piece.overlap - (grams.n - 1)  # else counted in the piece before
            at, rows = at[whole], rows[whole]
            first = np.searchsorted(grams.hashes, hashes[at])
            many = np.searchsorted(grams.hashes, hashes[at], side="right") - first
            ends = np.cumsum(many)
            each = np.repeat(first - ends + many, many) + np.arange(ends[-1] if len(ends) else 0)
            pairs.append((np.repeat(rows + piece.first_row, many), grams.items[each]))
    if not pairs:
        return Found(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    flat = np.stack([np.concatenate(column) for column in zip(*pairs, strict=True)], axis=1)
    found, counts = np.unique(flat, axis=0, return_counts=True)
    return Found(found[:, 0], found[:, 1], counts)
