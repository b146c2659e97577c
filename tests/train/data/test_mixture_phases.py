"""Tests for train.data.phase_counts: whole samples of each source in each phase."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.phase_counts import whole_shares

WEIGHT = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 10**9))


@st.composite
def ideal_shares(draw: st.DrawFn) -> list[list[Fraction]]:
    n = draw(st.integers(2, 12))
    phases = []
    for _ in range(draw(st.integers(0, 12))):
        samples = draw(st.one_of(st.integers(1, 3), st.integers(1, 60), st.integers(1, 10**12)))
        weights = draw(st.lists(WEIGHT, min_size=n, max_size=n).filter(any))
        phases.append([Fraction(weight * samples, sum(weights)) for weight in weights])
    return phases


def check(ideal: list[list[Fraction]]) -> None:
    shares = whole_shares(ideal)
    assert len(shares) == len(ideal)
    ahead = [Fraction(0)] * len(ideal[0]) if ideal else []
    for goals, found in zip(ideal, shares, strict=True):
        assert sum(found) == sum(goals)
        assert min(found) >= 0
        assert all(n == 0 for n, goal in zip(found, goals, strict=True) if goal == 0)
        ahead = [a + n - goal for a, n, goal in zip(ahead, found, goals, strict=True)]
        assert max(map(abs, ahead)) < 1


@settings(deadline=None)
@given(ideal=ideal_shares())
def test_counts_are_within_one_of_the_ideal_at_each_border(ideal: list[list[Fraction]]) -> None:
    check(ideal)


def test_each_phase_may_drop_the_source_that_was_rounded_up() -> None:
    """Choosing the nearest counts border by border leaves the last sources far behind."""
    n, ideal, dropped = 20, [], set[int]()
    while len(dropped) < n - 1:
        alive = [source for source in range(n) if source not in dropped]
        goal = Fraction(3 * len(alive) + 1, len(alive))
        ideal.append([goal if source in alive else Fraction(0) for source in range(n)])
        check(ideal)
        last = whole_shares(ideal)[-1]
        dropped.add(max(alive, key=lambda source: last[source]))


def test_a_hundred_phases_of_many_sources() -> None:
    ideal = [[Fraction((s * p * 7919 + s) % 1009, 1) for s in range(40)] for p in range(1, 101)]
    ideal = [[goal / sum(goals) * 1001 for goal in goals] for goals in ideal]
    check(ideal)
