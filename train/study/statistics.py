"""Comparison of two variants over paired seeds: interval, p, and the seeds that would say more.

The pairs are seeds: both runs of a pair have the same seed. All functions are of numbers only.

- `compare`: the mean of the paired differences, its 95 % confidence interval and p by the paired t
  test, and p by the sign-flip permutation test, which assumes no distribution. With n pairs the
  latter is at least 2 / 2**n, 0.0625 for 5: it cannot decide at 0.01 with fewer than 8 seeds. So
  the t test decides, and the other p is shown beside it.
- `holm`: p corrected for the number of comparisons (Holm 1979).
- `seeds_needed`: the pairs with which the t test finds a difference with a probability of 80 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

POWER = 0.8
CONFIDENCE = 0.95
MOST_SEEDS = 1000
"""Above this a number of seeds is no plan."""
RESOLUTION = 1e-5
"""Relative: results are rounded to six digits, so smaller differences are rounding."""
EXACT_PAIRS = 14
"""Up to so many pairs the permutation test enumerates all signs; above, it samples."""
_RESAMPLES = 20_000


@dataclass(frozen=True)
class Comparison:
    """Differences between two variants, second minus first, over the seeds that both have.

    Attributes:
        n: Pairs with finite results.
        missing: Pairs of which a run failed or is not finite.
        mean: Mean difference; NaN without a pair.
        std: Standard deviation of the differences; NaN with fewer than two pairs.
        half_width: Half the 95 % confidence interval of the mean; NaN likewise.
        p: Of the paired t test, two-sided; None where there is none.
        p_permutation: Of the sign-flip test; None likewise.
        reason: Why there is no p; empty where there is one.
    """

    n: int
    missing: int
    mean: float
    std: float
    half_width: float
    p: float | None
    p_permutation: float | None
    reason: str = ""


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare the results of two variants, seed by seed.

    Args:
        first: One result per seed; NaN where a run has none.
        second: The same of the other variant, for the same seeds.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    both = np.isfinite(a) & np.isfinite(b)
    differences = b[both] - a[both]
    n, missing = len(differences), int(len(a) - both.sum())
    mean = float(differences.mean()) if n else math.nan

    def without_p(reason: str, std: float = math.nan, half_width: float = math.nan) -> Comparison:
        return Comparison(n, missing, mean, std, half_width, None, None, reason)

    if n < 2:
        return without_p("two seeds are the least" if n else "no seed has both results")
    std = float(differences.std(ddof=1))
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    level = float(np.abs(np.concatenate([a[both], b[both]])).max())
    if np.abs(differences).max() <= RESOLUTION * level:
        return without_p("the results are equal", std, half_width)
    if std <= RESOLUTION * level / 10:
        return without_p("the differences do not vary with the seed", std, half_width)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    if not math.isfinite(p):
        return without_p("the t test has no result", std, half_width)
    return Comparison(n, missing, mean, std, half_width, p, _sign_flip(differences))


def _sign_flip(differences: np.ndarray) -> float:
    found = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=math.inf if len(differences) <= EXACT_PAIRS else _RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Correct p for the number of comparisons (Holm 1979); a None counts, and stays None."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * (ps[i] or 0.0)))
        corrected[i] = largest
    return corrected


def seeds_needed(std: float, difference: float, alpha: float) -> int | None:
    """Return the fewest pairs that resolve a difference with a power of 80 %.

    Args:
        std: Standard deviation of the paired differences.
        difference: The size of the true difference.
        alpha: Level of the two-sided t test, after the correction.

    Returns:
        At least 2; None if it would be more than `MOST_SEEDS`, or cannot be known.
    """
    if not (math.isfinite(std) and math.isfinite(difference)) or std < 0 or difference == 0:
        return None
    if std == 0:
        return 2
    n = np.arange(2, MOST_SEEDS + 1)
    enough = np.flatnonzero(power(n, std, abs(difference), alpha) >= POWER)
    return int(n[enough[0]]) if len(enough) else None


def power(n: np.ndarray, std: float, difference: float, alpha: float) -> np.ndarray:
    """Return the probability that the two-sided t test finds a difference with ``n`` pairs."""
    df = n - 1
    shift = np.sqrt(n) * min(difference / std, 1e6)
    limit = stats.t.isf(alpha / 2, df)
    found: np.ndarray = 1 - _nct_cdf(limit, df, shift) + _nct_cdf(-limit, df, shift)
    return np.asarray(found.clip(0, 1))


def _nct_cdf(t: np.ndarray, df: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Distribution function of the noncentral t; an approximation where scipy returns NaN.

    scipy returns NaN for some large shifts. Abramowitz and Stegun 26.7.10 is close there.
    """
    near = stats.norm.cdf((t * (1 - 1 / (4 * df)) - shift) / np.sqrt(1 + t**2 / (2 * df)))
    with np.errstate(all="ignore"):
        exact = stats.nct.cdf(t, df, shift)
    usable = np.isfinite(exact) & (exact >= 0) & (exact <= 1) & (np.abs(shift) < 30)
    return np.asarray(np.where(usable, exact, near))


def seed_noise(values: Sequence[float]) -> tuple[int, float, float]:
    """Return the number of finite results, their mean and standard deviation (NaN where none)."""
    finite = np.asarray([value for value in values if math.isfinite(value)])
    n = len(finite)
    return (
        n,
        float(finite.mean()) if n else math.nan,
        float(finite.std(ddof=1)) if n > 1 else math.nan,
    )
