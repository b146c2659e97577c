r"""Sampling order of a mixture of sources, as a stateless function.

    sample i of the run  ->  source, its own sample number  ->  window, by the source's `DataOrder`

**Phases.** The run's samples are cut into phases, each with a weight per source. The ideal count of
a source after n samples is the sum of its shares (weight / sum of weights) of the samples so far. A
phase but the last has a whole number of samples of each source, so that all counts are within 1 of
the ideal at each border (`train.data.phase_counts`); a source of weight 0 has none.

**In a phase.** A binary tree over the sources (Huffman, by weight) divides the samples:

                 root: m samples                   the left child of a node of weight V has, of the
               /                 \                 node's first m samples,
        web: 7 of 10          node: 3 of 10             floor((m * weight of left + offset) / V)
                              /          \
                      code: 2 of 3    books: 1 of 3

so any sample is found by one division per level. The offset is V / 2, which rounds to the nearest.
With phases it is moved so that sources wait which are ahead of their ideal counts; as these
distances differ at a phase's begin and end, the offset grows or falls evenly in between. A node's
rounding error is at most 1/2, and its children inherit it times their fractions: so no source is
far from its share.

**Pairs.** Such a sequence repeats itself, as `web web code web`. So the two samples of each pair
are swapped or not, by a hash of the seed and the pair's number. Pairs begin where the phase does. A
swap moves a count by at most 1/2 beyond its largest error; sources that this could take farther
than 2 from the ideal are not swapped.

**Bound.** `Mixture.bound` is a proven bound of the distance of any count from its ideal, at any
prefix: 2 with one phase, and with several the largest error before swaps, if that is above 2.

All numbers are integers or fractions of any size, so no count drifts, at any length of run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from train.data.order import Int64Array, UInt64Array, mix, round_keys
from train.data.phase_counts import whole_shares

HALF = Fraction(1, 2)
BOUND = 2  # a count that swaps could take farther from its ideal is left as it is


@dataclass(frozen=True)
class _Node:
    """A source, or two nodes that share samples."""

    weight: int
    source: int = -1
    left: _Node | None = None
    right: _Node | None = None
    step: int = 0
    offset: int = 0
    unit: int = 1
    error: Fraction = Fraction(0)  # of a source: it is never farther from its ideal, before swaps

    def left_counts(self, first: int, count: int) -> list[int]:
        """Return how many of the node's first samples, in ``count`` steps, the left child has."""
        value = first * self.step + self.offset
        return [(value + i * self.step) // self.unit for i in range(count)]

    def leaves(self) -> Iterator[_Node]:
        """Yield the nodes of the sources."""
        if self.left is None or self.right is None:
            yield self
        else:
            yield from self.left.leaves()
            yield from self.right.leaves()


def _tree(weights: Sequence[int]) -> _Node:
    """Build the tree of the sources of positive weight."""
    queue = [(weight, i, _Node(weight, i)) for i, weight in enumerate(weights) if weight]
    heapq.heapify(queue)
    for number in itertools.count(len(weights)):  # breaks ties
        _, _, small = heapq.heappop(queue)
        if not queue:
            return small
        _, _, large = heapq.heappop(queue)
        weight = small.weight + large.weight
        heapq.heappush(queue, (weight, number, _Node(weight, -1, large, small)))
    raise AssertionError


def _shifted(
    node: _Node,
    begin: Sequence[Fraction],
    end: Sequence[Fraction],
    off: Fraction = Fraction(0),
    error: Fraction = Fraction(0),
) -> _Node:
    """Return the tree with offsets that let sources wait which are ahead of their ideal counts.

    Args:
        begin: Count minus ideal count of each source at the first sample of the phase.
        end: The same at the end of the phase; in between it is on the straight line.
        off: Bound of the distance of the node's count from its weight times the time.
        error: The part of it which does not come from the offsets.
    """
    weight, left, right = node.weight, node.left, node.right
    if left is None or right is None:
        return replace(node, error=error + max(abs(begin[node.source]), abs(end[node.source])))
    shifts = [HALF + (_mean(right, ahead) - _mean(left, ahead)) / 2 for ahead in (begin, end)]
    first, last = (min(max(0, math.floor(shift * weight)), weight - 1) for shift in shifts)
    values = (left.weight * weight + last - first, first * weight, weight * weight)
    step, offset, unit = (value // math.gcd(*values) for value in values)
    shifts = [Fraction(n, weight) + Fraction(1, 2 * unit) - HALF for n in (first, last)]
    moved = [
        _moved(right, -shift, _moved(left, shift, ahead))
        for shift, ahead in zip(shifts, (begin, end), strict=True)
    ]
    # The node's own time, its count / its weight, differs from the phase's by off / weight.
    late = abs(shifts[1] - shifts[0]) * min(Fraction(1), off / weight)
    far = HALF + max(map(abs, shifts))
    left, right = (
        _shifted(
            child,
            moved[0],
            moved[1],
            off * child.weight / weight + far,
            error * child.weight / weight + HALF + late,
        )
        for child in (left, right)
    )
    return _Node(weight, -1, left, right, step, offset, unit)


def _mean(node: _Node, ahead: Sequence[Fraction]) -> Fraction:
    """Return the mean of the sources of a node, by weight."""
    return (
        sum((ahead[leaf.source] * leaf.weight for leaf in node.leaves()), Fraction(0)) / node.weight
    )


def _moved(node: _Node, shift: Fraction, ahead: Sequence[Fraction]) -> list[Fraction]:
    """Add to the sources of a node their shares of a shift of its samples."""
    moved = list(ahead)
    for leaf in node.leaves():
        moved[leaf.source] += shift * leaf.weight / node.weight
    return moved


def _sources(node: _Node, first: int, count: int) -> Int64Array:
    """Return the sources of a node's samples [first, first + count), before the swaps."""
    if node.left is None or node.right is None:
        return np.full(count, node.source, np.int64)
    left = node.left_counts(first, count + 1)
    is_left = np.diff(np.array([n - left[0] for n in left], np.int64)).astype(bool)
    n_left = left[-1] - left[0]
    found = np.empty(count, np.int64)
    found[is_left] = _sources(node.left, left[0], n_left)
    found[~is_left] = _sources(node.right, first - left[0], count - n_left)
    return found


def _add_counts(node: _Node, samples: int, counts: list[int]) -> None:
    """Add the sources of a node's first samples to the counts."""
    if node.left is None or node.right is None:
        counts[node.source] += samples
    else:
        (left,) = node.left_counts(samples, 1)
        _add_counts(node.left, left, counts)
        _add_counts(node.right, samples - left, counts)


@dataclass(frozen=True)
class _Phase:
    """Samples [first, end) of the run; `before`: the count of each source at the first."""

    first: int
    end: int | None
    before: tuple[int, ...]
    tree: _Node
    keys: UInt64Array

    @cached_property
    def movable(self) -> np.ndarray:
        """Which sources a swap cannot take farther than `BOUND` from the ideal: (sources,) bool."""
        movable = np.zeros(len(self.before), bool)
        movable[[leaf.source for leaf in self.tree.leaves() if leaf.error + HALF <= BOUND]] = True
        return movable

    def counts(self, samples: int) -> list[int]:
        """Return the count of each source after so many samples of the phase, before the swaps."""
        counts = list(self.before)
        _add_counts(self.tree, samples, counts)
        return counts

    def samples(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return source and own number of the phase's samples [first, first + count)."""
        begin, end = first - first % 2, first + count + (first + count) % 2
        if self.end is not None:
            end = min(end, self.end - self.first)
        sources = _sources(self.tree, begin, end - begin)
        pairs = sources[: len(sources) // 2 * 2].reshape(-1, 2)  # a view
        numbers = np.arange(len(pairs), dtype=np.uint64) + np.uint64(begin // 2)
        is_swapped = self.movable[pairs].all(1)
        is_swapped &= mix(mix(numbers + self.keys[0]) ^ self.keys[1]) % np.uint64(2) == 1
        pairs[is_swapped] = pairs[is_swapped, ::-1]

        own, counts = np.empty_like(sources), self.counts(begin)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            own[chosen] = counts[source] + np.arange(len(chosen))
        asked = slice(first - begin, first - begin + count)
        return sources[asked], own[asked]


class Mixture:
    """Maps the samples of a run to sources.

    Args:
        phases: Per phase the part of the run (0 to 1) at which it ends, and its weights, one per
            source, not all 0. The last ends at 1.
        samples: Samples of the run.
        seed: Decides which pairs are swapped.
    """

    def __init__(
        self, phases: Sequence[tuple[float, Sequence[float]]], samples: int, seed: int
    ) -> None:
        borders = [0, *(round(Fraction(repr(until)) * samples) for until, _ in phases[:-1])]
        exact = [[Fraction(repr(weight)) for weight in weights] for _, weights in phases]
        bounded = [  # a phase of a short run may be empty
            (number, first, end)
            for number, (first, end) in enumerate(itertools.pairwise(borders))
            if first < end
        ]
        ideal = [_ideal(exact[number], end - first) for number, first, end in bounded]
        before, ahead = (0,) * len(exact[0]), [Fraction(0)] * len(exact[0])
        self._phases: list[_Phase] = []
        shares = whole_shares(ideal)
        for (number, first, end), goals, found in zip(bounded, ideal, shares, strict=True):
            at_end = [a + n - goal for a, n, goal in zip(ahead, found, goals, strict=True)]
            tree, keys = _shifted(_tree(found), ahead, at_end), round_keys(seed, number, "mixture")
            self._phases.append(_Phase(first, end, before, tree, keys))
            before, ahead = tuple(a + b for a, b in zip(before, found, strict=True)), at_end
        unit = math.lcm(*(weight.denominator for weight in exact[-1]))
        tree = _shifted(_tree([int(weight * unit) for weight in exact[-1]]), ahead, ahead)
        keys = round_keys(seed, len(phases) - 1, "mixture")
        self._phases.append(_Phase(borders[-1], None, before, tree, keys))
        errors = [leaf.error for phase in self._phases for leaf in phase.tree.leaves()]
        self.bound = float(max(Fraction(BOUND), *errors))  # no count is ever farther from its ideal

    def samples(self, start: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return the samples [start, start + count) of the run: source, and its own number.

        Returns:
            Two arrays, (count,) int64: index of the source; number of the sample among those of
            the source, from 0.
        """
        parts = []
        for phase in self._phases:
            first = max(start, phase.first)
            end = start + count if phase.end is None else min(start + count, phase.end)
            if first < end:
                parts.append(phase.samples(first - phase.first, end - first))
        sources, numbers = zip(*parts, strict=True) if parts else ([[]], [[]])
        return np.concatenate(sources).astype(np.int64), np.concatenate(numbers).astype(np.int64)

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first samples of the run each source has."""
        phase = next(p for p in reversed(self._phases) if p.first <= samples)
        done = samples - phase.first
        counts = phase.counts(done - done % 2)
        if done % 2:
            counts[int(phase.samples(done - 1, 1)[0][0])] += 1
        return counts


def _ideal(weights: Sequence[Fraction], samples: int) -> list[Fraction]:
    """Return the share of each source in some samples."""
    per_weight = samples / sum(weights, Fraction(0))
    return [weight * per_weight for weight in weights]
