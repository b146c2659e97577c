"""MinHash signatures: how alike two documents are, from 224 bytes each.

A document is the set of its runs of five plain words. The signature holds, for 112 hash functions,
the least hash over this set; two documents agree in each with the probability of their Jaccard
similarity s, the size of the intersection of the two sets divided by that of their union (Broder,
1997). Function k is ``x -> MULTIPLIERS[k] * x`` modulo 2**64 on 64-bit hashes x.

Of each least hash 16 bits are kept, mixed from all 64. Unequal ones agree by accident with 2**-16:
a band of 8 differs from one of full hashes once in 2**112 pairs, and the estimate of s by 0.00002.

A document with fewer than five words has no set, hence no signature: it is never a near duplicate
(exact duplicates are found by the whole text). In Chinese and Japanese a character is a word. A
document longer than `words.LONG` bytes is cut between words; the minima of its parts are merged,
with the runs that cross a cut.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pipeline.curate.hashing import gram_hashes, mix64, splitmix64
from pipeline.curate.words import Texts, plain_pieces

HASHES = 112
"""Hash functions: 14 bands of 8, or 16 of 7."""
NGRAM = 5
"""Words of a run."""
_ROWS = 1 << 14


@lru_cache(1)
def multipliers() -> np.ndarray:
    """Return the multiplier of each hash function, odd: (HASHES,) uint64."""
    odd: np.ndarray = splitmix64(112, HASHES) | np.uint64(1)
    return odd


def sign(texts: Texts, ngram: int = NGRAM) -> np.ndarray:
    """Return the signatures of a batch.

    Returns:
        (d, HASHES) uint16; all 0 for a row without a signature.
    """
    signed = np.empty((len(texts.offsets) - 1, HASHES), np.uint16)
    for first in range(0, len(signed), _ROWS):  # 64 bits of each hash are kept until all are found
        offsets = texts.offsets[first : first + _ROWS + 1]
        part = Texts(texts.data[offsets[0] : offsets[-1]], offsets - offsets[0])
        signed[first : first + _ROWS] = _sign(part, ngram)
    return signed


def _sign(texts: Texts, ngram: int) -> np.ndarray:
    least = np.full((HASHES, len(texts.offsets) - 1), np.uint64(2**64 - 1))
    signed = np.zeros(len(texts.offsets) - 1, dtype=bool)
    for grams, rows, starts in _grams(texts, ngram):
        buffer = np.empty_like(grams)
        found = np.empty(len(rows), dtype=np.uint64)
        for k, multiplier in enumerate(multipliers()):
            np.multiply(grams, multiplier, out=buffer)
            np.minimum.reduceat(buffer, starts, out=found)
            least[k, rows] = np.minimum(least[k, rows], found)
        signed[rows] = True
    kept = (mix64(least) >> np.uint64(48)).astype(np.uint16)
    kept[:, ~signed] = 0
    return np.ascontiguousarray(kept.T)


def shingles(texts: Texts, ngram: int = NGRAM) -> list[np.ndarray]:
    """Return the set that a row's signature stands for: ascending uint64 hashes, per row."""
    found: list[list[np.ndarray]] = [[] for _ in texts.offsets[1:]]
    for grams, rows, starts in _grams(texts, ngram):
        for row, part in zip(rows.tolist(), np.split(grams, starts[1:]), strict=True):
            found[row].append(part)
    return [
        np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64) for parts in found
    ]


def _grams(texts: Texts, ngram: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the hashes of runs of words, the rows that have any, and where each row's begin."""
    for piece in plain_pieces(texts, overlap=ngram - 1):
        counts = np.maximum(np.diff(piece.firsts) - ngram + 1, 0)
        rows = np.flatnonzero(counts)
        if not len(rows):
            continue
        grams = gram_hashes(piece.hashes, ngram)
        starts = np.concatenate([[0], np.cumsum(counts[rows])])
        whole = np.repeat(piece.firsts[rows] - starts[:-1], counts[rows])
        whole += np.arange(starts[-1])
        yield grams[whole], rows + piece.first_row, starts[:-1]
