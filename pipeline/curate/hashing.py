"""64-bit hashes of spans of bytes and of runs of words, without a Python object per word.

A span of up to 64 bytes is read as eight-byte numbers at any address, all spans at once, and each
number is multiplied and mixed into the hash; a longer span is hashed by XXH3. The constants come
from `splitmix64`, which is written out here, so that they depend on no library's random numbers.
"""

from typing import Final

import numpy as np
import xxhash

_MASK = (1 << 64) - 1
ODD: Final = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio."""
_OTHER_ODD: Final = np.uint64(0xD6E8FEB86659FD93)
_LONGEST = 64
"""Bytes of the longest span that is not hashed by XXH3: words are shorter."""
_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)


def splitmix64(seed: int, count: int) -> np.ndarray:
    """Return the first numbers of SplitMix64 (Steele et al., 2014): (count,) uint64."""
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


def span_hashes(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash spans of bytes: equal spans have equal hashes, wherever they are.

    Args:
        data: (n,) uint8.
        starts: (k,) int64, first byte of each span, in any order.
        ends: (k,) int64, one past its last byte; spans may overlap and be empty.

    Returns:
        (k,) uint64. Different spans of up to 8 bytes and one size never have the same hash.
    """
    padded = np.concatenate([data, np.zeros(8, dtype=np.uint8)])
    number_at = np.ndarray((len(data) + 1,), dtype="<u8", buffer=padded, strides=(1,))
    sizes = ends - starts
    hashes: np.ndarray = sizes.astype(np.uint64)
    hashes *= ODD
    chosen: slice | np.ndarray = slice(None)
    for done in range(0, _LONGEST, 8):
        if done:
            chosen = np.flatnonzero((sizes > done) & (sizes <= _LONGEST))
            if not len(chosen):
                break
        numbers = number_at[starts[chosen] + done]
        numbers &= _FIRST_BYTES[np.minimum(sizes[chosen] - done, 8)]
        numbers *= _OTHER_ODD
        hashes[chosen] = mix64(hashes[chosen] ^ numbers)
    view = data.data
    for i in np.flatnonzero(sizes > _LONGEST).tolist():
        hashes[i] = xxhash.xxh3_64_intdigest(view[starts[i] : ends[i]])
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
    grams = hashes[:count].copy()
    for i in range(1, n):
        grams *= ODD
        grams += hashes[i : i + count]
    return mix64(grams)
