"""Sampling order of the training data, as a stateless function.

The train split is one virtual stream of tokens, cut into windows of T + 1 tokens at stride T
(``block_size``). Window w holds the tokens [w * T, w * T + T + 1): its last token is only a target,
and is the first input of the next window. So each token of the stream is a target exactly once,
except the first.

    global sample g  =  epoch e * n_windows + i          (g counts all samples since the start)
    window of g      =  permute(seed, e, i)              (a bijection of [0, n_windows))

The permutation is computed, not stored: a generalised Feistel network over Z_a x Z_b with
a * b >= n, applied again until the value is below n (cycle walking: Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002). It needs O(1) memory for any n. The number of samples
seen is the only state of the loader; processes, ranks and micro-batches do not change the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # even, so that both halves end in the domain they started in

UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]


def mix(x: UInt64Array) -> UInt64Array:
    """Mix 64 bits: the finaliser of SplitMix64 (Steele et al., 2014); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = x ^ (x >> np.uint64(31))
    return mixed


@lru_cache(maxsize=64)  # two epochs of each source
def round_keys(seed: int, epoch: int, name: str = "") -> UInt64Array:
    """Return the keys of a permutation, (ROUNDS,), for each seed, epoch and name another."""
    # SeedSequence, not seed + epoch: (seed 1, epoch 0) must be unrelated to (seed 0, epoch 1).
    entropy = [seed, epoch, *name.encode()]
    keys = np.random.SeedSequence(entropy).generate_state(ROUNDS, np.uint64)
    return keys.astype(np.uint64)  # for the type checker


def permute(index: NDArray[Any], n: int, keys: UInt64Array) -> Int64Array:
    """Map indices through a keyed bijection of [0, n).

    Args:
        index: Integers in [0, n), any shape.
        n: Size of the domain, at least 1.
        keys: One uint64 per round.

    Returns:
        int64 array of the same shape; the image of [0, n) has each value once.
    """
    a = math.isqrt(n - 1) + 1  # ceil(sqrt(n)); a * b exceeds n by less than a, so few values walk
    b = -(-n // a)
    value = np.asarray(index).astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], a, b, keys)
        outside = value >= n
    return value.astype(np.int64)


def _feistel(value: UInt64Array, a: int, b: int, keys: UInt64Array) -> UInt64Array:
    """One pass of the network: a bijection of [0, a * b)."""
    right, left = np.divmod(value, np.uint64(a))  # left in Z_a, right in Z_b
    for number, key in enumerate(keys):
        modulus = np.uint64(b if number % 2 else a)
        # Reduce before adding: a sum that wraps at 2^64 would be no bijection modulo `modulus`.
        left, right = right, (left + mix(right + key) % modulus) % modulus
    joined: UInt64Array = right * np.uint64(a) + left
    return joined


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Maps each global sample to a window of the train split.

    Attributes:
        n_tokens: Length of the train split in tokens.
        block_size: T, inputs per window; a window has T + 1 tokens.
        seed: 0 ... 2^32 - 1.
        name: Of a source: makes its permutations its own.
        order: "shuffled", a new permutation per epoch, or "sequential", the order on disk (for
            comparison with other codebases).
    """

    n_tokens: int
    block_size: int
    seed: int
    name: str = ""
    order: Literal["shuffled", "sequential"] = "shuffled"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}: it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must lie in 0 ... 2^32 - 1")
        if self.n_windows < 1:
            raise ValueError(
                f"{self.n_tokens} tokens hold no window of block_size + 1 = {self.block_size + 1}"
            )

    @property
    def n_windows(self) -> int:
        """Windows in the split: the samples per epoch."""
        return (self.n_tokens - 1) // self.block_size

    def starts(self, start: int, count: int) -> Int64Array:
        """Return the first tokens of the windows of `samples`: (count,) int64."""
        return self.samples(start, count) * self.block_size

    def samples(self, start: int, count: int) -> Int64Array:
        """Return the windows of the global samples [start, start + count), across epochs.

        Returns:
            int64, shape (count,): window numbers in [0, n_windows). Window ``w`` holds the tokens
            [w * block_size, (w + 1) * block_size + 1) of the split.
        """
        if start < 0 or count < 0:
            raise ValueError(f"samples({start}, {count}): neither may be negative")
        windows = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:  # one pass per epoch
            epoch, first = divmod(start + done, self.n_windows)
            n = min(count - done, self.n_windows - first)
            index = np.arange(first, first + n, dtype=np.int64)
            if self.order == "shuffled":
                salt = f"source {self.name}" if self.name else ""  # no other user of keys has it
                index = permute(index, self.n_windows, round_keys(self.seed, epoch, salt))
            windows[done : done + n] = index
            done += n
        return windows
