"""Tests for train.summation: one sum, bit for bit, however its terms are divided."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.summation import Counter, most_nodes, nodes_of


def by_definition(leaves: np.ndarray) -> np.ndarray:
    """The sum as the module defines it, by recursion over all leaves at once."""

    def node(start: int, level: int) -> np.ndarray:
        if level == 0:
            return leaves[start]
        half = 1 << (level - 1)
        total: np.ndarray = node(start, level - 1) + node(start + half, level - 1)
        return total

    def fold(start: int, n: int) -> np.ndarray:
        level = n.bit_length() - 1
        rest = n - (1 << level)
        left = node(start, level)
        return left + fold(start + (1 << level), rest) if rest else left

    return fold(0, len(leaves))


def divided(leaves: np.ndarray, shares: Sequence[range]) -> np.ndarray:
    """The sum over ranks, each of which pushes its nodes."""
    final: Counter[np.ndarray] = Counter(np.add)
    for share in shares:
        own: Counter[np.ndarray] = Counter(np.add)
        for leaf in share:
            own.push(leaf, leaves[leaf])
        assert [(node.start, node.level) for node in own.nodes] == nodes_of(share)
        assert len(own.nodes) <= most_nodes(share) <= 2 * len(share).bit_length() + 1
        for node in own.nodes:
            final.push(node.start, node.value, node.level)
    return final.total()


def some_leaves(n: int, seed: int) -> np.ndarray:
    """(n, 16) float32 of so many magnitudes that every order of addition rounds differently."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, 16)) * 10.0 ** rng.integers(-6, 7, (n, 16))
    return values.astype(np.float32)


@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=12), st.integers(0, 2**32 - 1))
def test_no_division_changes_a_bit(n: int, cuts: list[int], seed: int) -> None:
    """Shares of any size, in order, also empty ones."""
    leaves = some_leaves(n, seed)
    ends = [0, *sorted(min(cut, n) for cut in cuts), n]
    shares = [range(a, b) for a, b in pairwise(ends)]
    assert divided(leaves, shares).tobytes() == by_definition(leaves).tobytes()


def test_other_orders_round_differently() -> None:
    leaves = some_leaves(11, 0)
    assert leaves.sum(axis=0).tobytes() != by_definition(leaves).tobytes()


def test_even_shares_send_one_node() -> None:
    assert [nodes_of(range(8 * r, 8 * r + 8)) for r in range(4)] == [
        [(0, 3)], [(8, 3)], [(16, 3)], [(24, 3)]
    ]  # fmt: skip
    assert most_nodes(range(8)) == 4
    assert nodes_of(range(3, 7)) == [(3, 0), (4, 1), (6, 0)]
