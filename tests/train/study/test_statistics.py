"""Tests for the statistics of studies: against scipy, enumeration, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from train.study import statistics
from train.study.statistics import compare, holm, seeds_needed

VALUES = st.lists(
    st.tuples(st.floats(1, 2), st.floats(1, 2)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3),
    min_size=2,
    max_size=8,
)


@given(VALUES)
def test_p_and_interval_are_those_of_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    found = compare(a, b)
    if found.p is None:
        assert found.reason
        return
    expected = stats.ttest_rel(b, a)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-6, abs=1e-9)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-6, abs=1e-9)
    swapped = compare(b, a)
    assert swapped.mean == pytest.approx(-found.mean)
    assert swapped.p == pytest.approx(found.p)


@given(VALUES)
def test_the_permutation_test_enumerates_all_signs(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    found = compare(list(a), list(b)).p_permutation
    if found is None:
        return
    differences = b - a
    signs = np.array([*itertools.product((-1, 1), repeat=len(pairs))])
    means = np.abs((signs * differences).mean(axis=1))
    assert found == pytest.approx((means >= abs(differences.mean()) * (1 - 1e-9)).mean())
    assert found >= 2 / 2 ** len(pairs) - 1e-12


def test_missing_runs_count_as_missing_and_leave_the_other_pairs() -> None:
    a, b = [1.0, 1.1, 1.2, 1.3], [1.2, math.nan, 1.45, math.inf]
    found = compare(a, b)
    assert (found.n, found.missing) == (2, 2)
    assert found.mean == pytest.approx(0.225)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),  # identical
        ([1.0, 2.0, 3.0], [1.000001, 2.0, 2.999999]),  # rounding
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]),  # no spread at all
        ([1.0], [2.0]),
        ([math.nan], [2.0]),
        ([], []),
    ],
)
def test_there_is_no_p_where_nothing_can_be_said(a: list[float], b: list[float]) -> None:
    found = compare(a, b)
    assert found.p is None
    assert found.reason


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm_is_monotone_and_between_p_and_bonferroni(ps: list[float | None]) -> None:
    corrected = holm(ps)
    known = [(p, c) for p, c in zip(ps, corrected, strict=True) if p is not None]
    assert [c is None for c in corrected] == [p is None for p in ps]
    for p, c in known:
        assert c is not None
        assert p <= c <= min(1.0, len(ps) * p) + 1e-12
    by_p = [c for _, c in sorted(known)]
    assert by_p == sorted(by_p, key=lambda c: c or 0)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # a worked example


def test_false_verdicts_are_at_most_as_rare_as_promised() -> None:
    """Four equal variants, three comparisons with the first: at most 1 % of studies claim one."""
    rng, alpha = np.random.default_rng(1), 0.01
    for n in (3, 4, 5):
        claims, studies = 0, 150
        for _ in range(studies):
            shared = rng.normal(0, 0.02, n)  # of the seed, which pairing removes
            runs = 4 + shared + rng.normal(0, 0.01, (4, n))
            ps = holm([compare(list(runs[0]), list(run)).p for run in runs[1:]])
            claims += any(p is not None and p < alpha for p in ps)
        assert claims <= stats.binom.ppf(0.9999, studies, alpha)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_seeds_needed_have_the_power_that_is_promised(ratio: float) -> None:
    needed = seeds_needed(0.01, 0.01 * ratio, 0.01)
    assert needed is not None
    rng = np.random.default_rng(2)

    def found(n: int) -> float:
        drawn = rng.normal(0.01 * ratio, 0.01, (20_000, n))
        return float((stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.01).mean())

    assert found(needed) >= 0.8 - 0.015
    assert needed == 2 or found(needed - 1) <= 0.8 + 0.015


@given(st.floats(0, 1e3), st.floats(-1e3, 1e3), st.floats(1e-6, 0.4))
def test_the_seeds_needed_are_a_number_whatever_scipy_returns(
    std: float, difference: float, alpha: float
) -> None:
    needed = seeds_needed(std, difference, alpha)
    assert needed is None or 2 <= needed <= statistics.MOST_SEEDS
    if needed is not None and std > 0:
        assert seeds_needed(std, 2 * difference, alpha) <= needed  # type: ignore[operator]
    if std > 0 and difference:
        n = np.arange(2, 200)
        power = statistics.power(n, std, abs(difference), alpha)
        assert np.isfinite(power).all()


def test_the_seeds_needed_are_unknown_for_what_is_no_number() -> None:
    for std, difference in ((math.nan, 1.0), (1.0, math.nan), (1.0, 0.0), (math.inf, 1.0)):
        assert seeds_needed(std, difference, 0.01) is None
    assert seeds_needed(1.0, 1e-4, 0.01) is None  # more than a plan
