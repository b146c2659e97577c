"""Whole numbers of samples for the phases of a mixture.

    ideal count of a source:  0     1     2     3     4 ...
    its samples:              |--1--|--2--|--3--|--4--| ...
    phases:                   0          | 1  |   2

The ideal shares of a phase are fractions. Sample k of a source belongs to the time in which the
ideal count of the source grows from k - 1 to k. A sample whose time is in one phase is placed
there. One whose time is in several, as 2 and 3 above, may be placed in any of them in which the
source has a share. Then each count is at each border the ideal one, rounded up or down.

Each phase must be filled exactly. The fractions do so, and the constraints are those of a flow, so
a choice of whole samples exists as well. It is found by augmenting paths (Kuhn's algorithm with a
capacity per phase): each sample takes the phase nearest to the middle of its time, and where no
room is left, others move. The choice is made first among those that are within 1/2 of the ideal at
each border, then, where none exists, within 5/8, 3/4, 7/8, and last within 1, where one exists
always.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

LIMITS = (4, 5, 6, 7, 8)  # eighths of a sample


@dataclass(eq=False)
class _Sample:
    """A sample whose time is in several phases."""

    source: int
    phases: list[int]  # in which it may be placed, the best first
    phase: int = -1  # in which it is


def whole_shares(ideal: Sequence[Sequence[Fraction]]) -> list[list[int]]:
    """Round the ideal shares of the phases of a run, so that errors do not add up.

    Args:
        ideal: Per phase the number of samples of each source; a phase has a whole number in all.

    Returns:
        Per phase the samples of each source, none where the ideal is 0. The sums of the phases are
        kept, and the count of a source is within 1 of its ideal at the end of each phase.
    """
    if not ideal:
        return []
    unit = 8 * math.lcm(*(share.denominator for of_phase in ideal for share in of_phase))
    ends = [[0] * len(ideal[0])]  # in units, as whole numbers of this size are faster
    for of_phase in ideal:
        grown = [share.numerator * (unit // share.denominator) for share in of_phase]
        ends.append([done + share for done, share in zip(ends[-1], grown, strict=True)])
    shares = [
        [max(0, end // unit + -first // unit) for first, end in zip(*pair, strict=True)]
        for pair in itertools.pairwise(ends)
    ]
    room = [int(sum(goal)) - sum(found) for goal, found in zip(ideal, shares, strict=True)]
    for limit in LIMITS:
        samples = _place(_between(ends, unit, unit // 8 * limit), room)
        if samples is not None:
            break
    else:
        raise AssertionError("no whole shares")
    for sample in samples:
        if sample.phase < len(shares):
            shares[sample.phase][sample.source] += 1
    return shares


def _between(ends: Sequence[Sequence[int]], unit: int, limit: int) -> list[_Sample]:
    """Return the samples that several phases could have, with a phase for what comes after all.

    Args:
        ends: Ideal counts at the borders, from 0, in units.
        unit: Units of one sample.
        limit: Largest distance of a count from the ideal one at a border, in units.
    """
    samples = []
    for source, borders in enumerate(zip(*ends, strict=True)):
        for k in sorted({-(-count // unit) for count in borders if count % unit}):
            begin, middle, done = (k - 1) * unit, k * unit - unit // 2, k * unit
            start = bisect.bisect_right(borders, begin) - 1
            counts = [*borders[start : bisect.bisect_left(borders, done) + 1], done]
            far = {
                phase: max(first - middle, middle - end)
                for phase, (first, end) in enumerate(itertools.pairwise(counts), start)
                if first < end and done - end <= limit >= first - begin
            }
            samples.append(_Sample(source, sorted(far, key=far.__getitem__)))
    return samples


def _place(samples: list[_Sample], room: Sequence[int]) -> list[_Sample] | None:
    """Place each sample in one of its phases so that all phases are full, if it is possible."""
    room = [*room, len(samples) - sum(room)]
    inside: list[list[_Sample]] = [[] for _ in room]
    if all(_augment(sample, inside, room) for sample in samples):
        return samples
    return None


def _augment(sample: _Sample, inside: list[list[_Sample]], room: Sequence[int]) -> bool:
    """Place a sample, and move as few others as possible to make room for it."""
    entering: dict[int, _Sample] = {}
    queue = deque([sample])
    while queue:
        moved = queue.popleft()
        for phase in moved.phases:
            if phase in entering:
                continue
            entering[phase] = moved
            if len(inside[phase]) < room[phase]:
                while phase >= 0:  # back along the path
                    moved = entering[phase]
                    inside[phase].append(moved)
                    phase, moved.phase = moved.phase, phase
                    if phase >= 0:
                        inside[phase].remove(moved)
                return True
            queue.extend(inside[phase])
    return False
