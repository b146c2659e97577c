"""64-bit hashes of spans of bytes and of runs of words, by prefix sums: no Python object per word.

The hash of the bytes b[0..n) is the polynomial ``sum(TABLE[b[i]] * BASE ** i)`` modulo 2**64, mixed.
The sums of all spans of a text come from one running sum S, as ``(S[end] - S[start]) * BASE **
-start``; BASE is odd and so has an inverse. All constants follow from `splitmix64`, which is written
out here, so they depend on no library (tests/pipeline/curate/test_words.py pins them).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BASE = 0x9E3779B97F4A7C15
"""Odd; 2**64 divided by the golden ratio."""
_WINDOW = 1 << 15
"""Bytes whose running sum is held at a time, so that the arrays stay in the cache of a core."""
_MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> np.ndarray:
    """Return the first numbers of the generator SplitMix64 (Steele et al., 2014): (count,) uint64."""
    numbers = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & _MASK
        z = seed
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        numbers.append(z ^ (z >> 31))
    return np.array(numbers, dtype=np.uint64)


def mix64(values: np.ndarray) -> np.ndarray:
    """Spread every input bit over all 64, one to one (the finalizer of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


@lru_cache(2)
def byte_table(fold_case: bool) -> np.ndarray:
    """Return the number of each byte value: (256,) uint64.

    Args:
        fold_case: Whether an ASCII capital has the number of its small letter.
    """
    table = splitmix64(20, 256)
    if fold_case:
        table[ord("A") : ord("Z") + 1] = table[ord("a") : ord("z") + 1]
    table.flags.writeable = False
    return table


@lru_cache(1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Return BASE ** i and BASE ** -i for i of a window and its end: (_WINDOW + 1,) uint64 each."""
    powers = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        factors = np.full(_WINDOW + 1, base, dtype=np.uint64)
        factors[0] = 1
        powers.append(np.cumprod(factors, dtype=np.uint64))
    return powers[0], powers[1]


def span_hashes(
    data: np.ndarray,
    spans: Sequence[tuple[np.ndarray, np.ndarray]],
    fold_case: bool = False,
) -> list[np.ndarray]:
    """Hash spans of bytes; equal spans have equal hashes, anywhere.

    Args:
        data: (n,) uint8.
        spans: Starts and ends, each (k,) int64 and ascending, of several sets of spans. They may
            overlap and be empty.
        fold_case: Whether to ignore the case of ASCII letters.

    Returns:
        For each set, (k,) uint64.
    """
    table, (powers, inverses) = byte_table(fold_case), _powers()
    flat = [positions for pair in spans for positions in pair]
    sums = [np.empty(len(positions), dtype=np.uint64) for positions in flat]
    running = np.zeros(_WINDOW + 1, dtype=np.uint64)
    for first in range(0, max(len(data), 1), _WINDOW):
        window = data[first : first + _WINDOW]
        stop = first + len(window)
        terms = running[1 : len(window) + 1]
        np.take(table, window, out=terms, mode="clip")
        terms *= powers[: len(window)]
        if first:
            terms *= np.uint64(pow(BASE, first, 1 << 64))
        np.cumsum(running[: len(window) + 1], out=running[: len(window) + 1])
        for positions, found in zip(flat, sums, strict=True):
            a, b = np.searchsorted(positions, [first, stop + (stop == len(data))])
            found[a:b] = running[positions[a:b] - first]
        running[0] = running[len(window)]
    hashes = []
    for (starts, _), before, after in zip(spans, sums[::2], sums[1::2], strict=True):
        sizes = after - before
        low = starts % _WINDOW
        sizes *= inverses[low]
        high = (starts - low) // _WINDOW
        if len(high) and high[-1]:
            far = pow(BASE, -_WINDOW, 1 << 64)
            factors = [pow(far, i, 1 << 64) for i in range(int(high[-1]) + 1)]
            sizes *= np.array(factors, dtype=np.uint64)[high]
        hashes.append(mix64(sizes))
    return hashes


def gram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash every run of n consecutive words.

    Args:
        hashes: (w,) uint64, of words.
        n: Words of a run, at least 1.

    Returns:
        (w - n + 1,) uint64, or none if there are fewer words.
    """
    count = max(len(hashes) - n + 1, 0)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        grams *= np.uint64(BASE)
        grams += hashes[i : i + count]
    return mix64(grams)
