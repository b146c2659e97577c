"""Exact and near duplicates: which rows have an earlier kept row that they repeat.

```
signatures ─► band_keys ─► shared_buckets ─► decide ─► twin and similarity of each dropped row
 224 B/row     8 B/band     rows that share    in row
                            a band's key       order
```

Two rows are candidates if their signatures agree in all hashes of a band (MinHash LSH). With b
bands of r hashes, rows of Jaccard similarity s are candidates with probability
``1 - (1 - s**r)**b`` (Leskovec et al., Mining of Massive Datasets, 3.4): half of the pairs of
s = 0.69 for 14 bands of 8.

Rows are decided in order: one is dropped if a candidate before it was kept and is similar. So every
twin is kept and is near its copy, a chain of small differences does not make distant rows
duplicates, and rows appended to a source never change a decision about the rows before them.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from pipeline.curate.hashing import ODD, mix64, splitmix64
from pipeline.curate.signatures import HASHES
from pipeline.curate.words import Texts

MOST_TWINS = 256
"""Kept rows of one bucket that a row is compared with: the earliest. More share a bucket only where
candidates are verified and fail, as pages of one template do; without a bound these cost quadratic
time."""
_BLOCK = 1 << 16
"""Rows whose buckets are Python numbers at a time."""

Similarity = Callable[[int, np.ndarray], np.ndarray]
"""The similarities of a row with other rows: ``(k,) int64 -> (k,) float64`` from 0 to 1."""


class Buckets(NamedTuple):
    """The buckets of at least two rows: the rows of a bucket have one band's key in common."""

    rows: np.ndarray
    """(m,) int64: the rows that share any bucket, ascending."""
    starts: np.ndarray
    """(m + 1,) int64: rows[i] is in ``buckets[starts[i] : starts[i + 1]]``."""
    buckets: np.ndarray
    """Numbers of buckets, int64."""
    total: int
    """Number of buckets."""


class Near(NamedTuple):
    """The rows that are near duplicates."""

    twins: np.ndarray
    """(n,) int64: the kept row that each row repeats, or -1."""
    values: np.ndarray
    """(n,) float64: similarity to the twin; NaN if there is none or none was computed."""


def text_hashes(texts: Texts) -> np.ndarray:
    """Return XXH3_128 of each text: (d, 2) uint64, high half first; (0, 0) for an empty one."""
    view, bounds = texts.data.data, texts.offsets.tolist()
    digests = (
        xxhash.xxh3_128_digest(view[a:b]) if b > a else bytes(16) for a, b in pairwise(bounds)
    )
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def exact_duplicates(
    hashes: np.ndarray, alive: np.ndarray, groups: np.ndarray | None = None
) -> np.ndarray:
    """Find the rows whose text is that of an earlier row.

    Args:
        hashes: (n, 2) uint64 of `text_hashes`, in row order.
        alive: (n,) bool: the rows to look at.
        groups: (n,) integers; if given, only rows of one group are compared.

    Returns:
        (n,) int64: the first row with the same text, or -1.
    """
    rows = np.flatnonzero(alive & hashes.any(axis=1))
    columns = [hashes[rows, 1], hashes[rows, 0]] + ([] if groups is None else [groups[rows]])
    order = np.lexsort(columns)  # stable: equal texts stay in row order
    new = np.ones(len(rows), dtype=bool)
    if len(rows):
        new[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    leaders = rows[order[np.flatnonzero(new)]][np.cumsum(new) - 1]
    twins = np.full(len(hashes), -1, dtype=np.int64)
    found = rows[order]
    twins[found[~new]] = leaders[~new]
    return twins


def band_keys(signatures: np.ndarray, bands: int = 14, rows: int = 8) -> np.ndarray:
    """Return the key of each band of each signature.

    Args:
        signatures: (d, HASHES) uint16.
        bands: Number of bands.
        rows: Hashes per band; ``bands * rows`` is at most HASHES.

    Returns:
        (bands, d) uint64; 0 for a row without a signature, and never for others.
    """
    if bands * rows > HASHES:
        raise ValueError(f"{bands} bands of {rows} hashes need more than {HASHES} hashes")
    constants = splitmix64(bands, rows) | np.uint64(1)
    keys = np.empty((bands, len(signatures)), dtype=np.uint64)
    for band in range(bands):
        key = np.full(len(signatures), np.uint64(band + 1))
        for i in range(rows):
            key = mix64(key * ODD + signatures[:, band * rows + i] * constants[i])
        keys[band] = np.maximum(key, np.uint64(1))
    keys[:, ~signatures.any(axis=1)] = 0
    return keys


def shared_buckets(
    keys: Iterable[np.ndarray], alive: np.ndarray, groups: np.ndarray | None = None
) -> Buckets:
    """Find the rows that have a band's key in common with another.

    Args:
        keys: (n,) uint64 for each band in turn: a generator, so that one band is in memory at a
            time. 0 is no key.
        alive: (n,) bool: the rows to look at.
        groups: (n,) integers; if given, only rows of one group share a bucket.
    """
    count = 0
    found_rows, found_buckets = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for band in keys:
        rows = np.flatnonzero(alive & (band != 0))
        key = band[rows]
        if groups is not None:
            key = mix64(key + groups[rows].astype(np.uint64) * ODD)
        order = np.argsort(key, kind="stable")
        key = key[order]
        same = np.zeros(len(key) + 1, dtype=bool)  # with the key before it
        same[1:-1] = key[1:] == key[:-1]
        shared = same[:-1] | same[1:]
        numbers = np.cumsum(~same[:-1][shared]) - 1 + count
        found_rows.append(rows[order[shared]])
        found_buckets.append(numbers)
        count = int(numbers[-1]) + 1 if len(numbers) else count
    flat, buckets = np.concatenate(found_rows), np.concatenate(found_buckets)
    order = np.argsort(flat, kind="stable")
    rows, starts = np.unique(flat[order], return_index=True)
    return Buckets(rows, np.append(starts, len(flat)), buckets[order], count)


def estimate(signatures: np.ndarray) -> Similarity:
    """Return the similarity that signatures estimate: the fraction of their hashes that agree.

    Args:
        signatures: (n, HASHES) uint16, of all rows; may be a memory map.
    """

    def similarity(row: int, others: np.ndarray) -> np.ndarray:
        agree: np.ndarray = (signatures[others] == signatures[row]).sum(axis=1) / HASHES
        return agree

    return similarity


def exactly(shingles: Callable[[int], np.ndarray]) -> Similarity:
    """Return the Jaccard similarity of the rows' sets.

    Args:
        shingles: Returns the set of a row: ascending distinct uint64, as `signatures.shingles`.
    """

    def similarity(row: int, others: np.ndarray) -> np.ndarray:
        own = shingles(row)
        return np.array([_jaccard(own, shingles(other)) for other in others.tolist()])

    return similarity


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 0.0


def decide(
    buckets: Buckets,
    n: int,
    similarity: Similarity | None = None,
    threshold: float = 0.0,
    reference: np.ndarray | None = None,
) -> Near:
    """Drop each row that is near an earlier kept one, or near a row of a reference.

    Args:
        buckets: The buckets of all rows.
        n: Number of rows.
        similarity: Verifies candidates; if None, every candidate is near.
        threshold: Least similarity of near rows.
        reference: (n,) bool, such as the validation documents. If given, the other rows are
            compared with these alone, earlier or later, and these get no twin.

    Returns:
        For each dropped row the most similar row it was compared with, and of several the first.
    """
    near = Near(np.full(n, -1, dtype=np.int64), np.full(n, np.nan))
    kept = _Kept(buckets.total)
    if reference is not None:
        for row, mine in _walk(buckets):
            if reference[row]:
                kept.add(row, mine)
    for row, mine in _walk(buckets):
        if reference is not None and reference[row]:
            continue
        candidates = kept.of(mine)
        if candidates and similarity is None:
            near.twins[row] = candidates[0]
        elif candidates and similarity is not None:
            values = similarity(row, np.array(candidates))
            best = int(values.argmax())
            if values[best] >= threshold:
                near.twins[row], near.values[row] = candidates[best], values[best]
        if reference is None and near.twins[row] < 0:
            kept.add(row, mine)
    return near


def _walk(buckets: Buckets) -> Iterator[tuple[int, list[int]]]:
    """Yield each row with the numbers of its buckets."""
    for first in range(0, len(buckets.rows), _BLOCK):
        starts = buckets.starts[first : first + _BLOCK + 1]
        numbers = buckets.buckets[starts[0] : starts[-1]].tolist()
        rows = buckets.rows[first : first + _BLOCK].tolist()
        for row, (start, stop) in zip(rows, pairwise((starts - starts[0]).tolist()), strict=True):
            yield row, numbers[start:stop]


class _Kept:
    """The kept rows of each bucket, of which most have one."""

    def __init__(self, count: int) -> None:
        self._first = array("q", [-1]) * count
        self._more: dict[int, list[int]] = {}

    def add(self, row: int, buckets: list[int]) -> None:
        for bucket in buckets:
            if self._first[bucket] < 0:
                self._first[bucket] = row
            elif len(more := self._more.setdefault(bucket, [])) < MOST_TWINS - 1:
                more.append(row)

    def of(self, buckets: list[int]) -> list[int]:
        """Return the rows of several buckets, ascending."""
        rows = {self._first[bucket] for bucket in buckets}
        for bucket in self._more.keys() & buckets:
            rows.update(self._more[bucket])
        return sorted(rows - {-1})


def components(buckets: Buckets, n: int) -> np.ndarray:
    """Join the rows of each bucket, and so rows that only a chain of buckets connects (datatrove).

    Returns:
        (n,) int64: the first row of the row's component, or -1 for the first row itself and for
        rows without candidates.
    """
    parents = np.arange(len(buckets.rows))
    owners = np.repeat(parents, np.diff(buckets.starts))
    while True:
        # Each bucket takes the least label of its rows, each row the least of its buckets.
        least = np.full(buckets.total, len(parents))
        np.minimum.at(least, buckets.buckets, parents[owners])
        following = parents.copy()
        np.minimum.at(following, owners, least[buckets.buckets])
        following = following[following]  # and its label's label: halves a chain
        if np.array_equal(following, parents):
            break
        parents = following
    twins = np.full(n, -1, dtype=np.int64)
    others = np.flatnonzero(parents != np.arange(len(parents)))
    twins[buckets.rows[others]] = buckets.rows[parents[others]]
    return twins
