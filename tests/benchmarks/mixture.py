"""Search for mixtures with counts far from the ideal: `python -m tests.benchmarks.mixture`.

Each climb starts from random weights, phases and seed, or from phases of which each drops a source
that is ahead, and changes one weight, border or seed at a time as long as the largest deviation
over all prefixes of the run does not fall. The same kinds of mixtures are then read at some places
of a run of 10^12 samples.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from fractions import Fraction

import numpy as np

from train.data.mixture import Mixture

Phases = list[tuple[float, list[float]]]

KINDS = ("one phase", "several phases", "sources dropped")
PATIENCE = 25  # changes without a larger deviation that end a climb


def deviation(phases: Phases, samples: int, seed: int) -> float:
    """Return the largest distance of a count from its ideal over all prefixes of a run."""
    n_sources = len(phases[0][1])
    sources, _ = Mixture(phases, samples, seed).samples(0, samples)
    ahead = np.zeros((samples, n_sources))
    ahead[np.arange(samples), sources] = 1
    ends = [0, *(round(Fraction(repr(until)) * samples) for until, _ in phases)]
    for (_, weights), first, end in zip(phases, ends, ends[1:], strict=False):
        ahead[first:end] -= np.array(weights) / sum(weights)
    return float(np.abs(ahead.cumsum(0)).max())


def some_weights(rng: random.Random, n: int) -> list[float]:
    """Draw weights: equal, of any skew, of golden ratios, with one dominant; some 0."""
    kind = rng.randrange(6)
    weights = [1.0] * n
    if kind == 0:
        weights = [rng.random() for _ in range(n)]
    elif kind == 1:
        weights = [10 ** rng.uniform(-5, 0) for _ in range(n)]
    elif kind == 2:
        weights = [1.618**i for i in range(n)]
        rng.shuffle(weights)
    elif kind == 3:
        weights = [float(rng.randrange(1, 20)) for _ in range(n)]
    elif kind == 4:
        weights = [10 ** rng.uniform(-4, -1) for _ in range(n)]
        weights[rng.randrange(n)] = 1.0
    if rng.random() < 0.4:
        weights = [weight * rng.randrange(2) for weight in weights]
    weights = [round(weight, 7) for weight in weights]
    return weights if any(weights) else [1.0] * n


def changed(rng: random.Random, phases: Phases) -> Phases:
    """Return phases of which one weight or one border is another."""
    found = [(until, list(weights)) for until, weights in phases]
    number = rng.randrange(len(found))
    weights = found[number][1]
    at = rng.randrange(len(weights))
    if rng.random() < 0.25 and number + 1 < len(found):
        borders = [until for until, _ in found]
        borders[number] = rng.random()
        found = [(u, w) for u, (_, w) in zip(sorted(borders), found, strict=True)]
    elif rng.random() < 0.3:
        weights[at] = 0.0 if weights[at] else rng.random()
    else:
        weights[at] = round(weights[at] * rng.choice((0.5, 0.9, 0.99, 1.01, 1.1, 2)), 9)
    return found if all(any(weights) for _, weights in found) else phases


def some_phases(rng: random.Random, n: int, count: int) -> Phases:
    """Draw phases with weights that have nothing to do with each other."""
    borders = [*sorted(rng.random() for _ in range(count - 1)), 1.0]
    return [(until, some_weights(rng, n)) for until in borders]


def dropping(rng: random.Random, n: int) -> tuple[Phases, int]:
    """Return phases of which each drops the source most ahead (or behind), and their samples."""
    base = [1.0] * n if rng.random() < 0.6 else some_weights(rng, n)
    base = [weight or 1.0 for weight in base]
    rounds, extra, sign = rng.choice((0, 1, 2, 3, 7)), rng.choice((1, 1, 2, 3)), rng.choice((1, -1))
    lengths = [rounds * left + min(extra, left) for left in range(n, 1, -1)] + [40]
    ends, samples = np.cumsum(lengths).tolist(), sum(lengths)
    alive, phases = set(range(n)), list[tuple[float, list[float]]]()
    for end in ends[:-1]:
        weights = [weight if source in alive else 0.0 for source, weight in enumerate(base)]
        phases.append((end / samples, weights))
        counts = Mixture([*phases, (1.0, weights)], samples, 0).counts(end)
        expected = ideal(phases, samples, end)
        alive.remove(max(alive, key=lambda s, c=counts, e=expected: sign * (c[s] - e[s])))  # type: ignore[misc]
    last = [weight if source in alive else 0.0 for source, weight in enumerate(base)]
    return [*phases, (1.0, last)], samples


def ideal(phases: Phases, samples: int, at: int) -> list[Fraction]:
    """Return the exact ideal counts after the first samples."""
    counts, first = [Fraction(0)] * len(phases[0][1]), 0
    for until, weights in phases:
        end = min(round(Fraction(repr(until)) * samples), at)
        exact = [Fraction(repr(weight)) for weight in weights]
        share = max(0, end - first) / sum(exact, Fraction(0))
        counts, first = [n + w * share for n, w in zip(counts, exact, strict=True)], max(first, end)
    return counts


def far_deviation(rng: random.Random, phases: Phases, samples: int, seed: int) -> float:
    """Return the largest deviation at some places of a long run, after borders among them."""
    mixture, worst = Mixture(phases, samples, seed), 0.0
    borders = [round(Fraction(repr(until)) * samples) for until, _ in phases[:-1]]
    for at in [*borders, *(rng.randrange(samples - 500) for _ in range(10))]:
        start, count = max(0, at - rng.randrange(2) * 500), 500
        ends = [b for b in borders if start < b < start + count]
        for first, end in itertools.pairwise([start, *ends, start + count]):
            counts, sources = mixture.counts(first), mixture.samples(first, end - first)[0]
            begin, goal = ideal(phases, samples, first), ideal(phases, samples, end)
            ahead = np.zeros((end - first, len(counts)))
            ahead[np.arange(end - first), sources] = 1
            ahead -= [float((b - a) / (end - first)) for a, b in zip(begin, goal, strict=True)]
            ahead[0] += [float(n - a) for n, a in zip(counts, begin, strict=True)]
            worst = max(worst, float(np.abs(ahead.cumsum(0)).max()))
    return worst


def main() -> None:
    """Search for some seconds, and print the largest deviation of each kind of mixture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, end = random.Random(args.seed), time.monotonic() + args.seconds
    worst, far = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    climbs, prefixes = 0, 0
    while time.monotonic() < end:
        kind, n, seed = KINDS[climbs % len(KINDS)], rng.randint(2, 20), rng.randrange(2**31)
        count = 1 if kind == "one phase" else rng.randint(2, 25)
        samples, phases = rng.choice((60, 300, 1000, 3000)), some_phases(rng, n, count)
        if kind == "sources dropped":
            phases, samples = dropping(rng, rng.randint(10, 24))
        best, stale = deviation(phases, samples, seed), 0
        while stale < PATIENCE and time.monotonic() < end:
            other = changed(rng, phases)
            other_seed = rng.randrange(2**31) if rng.random() < 0.2 else seed
            found = deviation(other, samples, other_seed)
            stale = 0 if found > best else stale + 1
            if found >= best:
                phases, seed, best = other, other_seed, found
            prefixes += samples
        climbs += 1
        worst[kind] = max(worst[kind], best)
        far[kind] = max(far[kind], far_deviation(rng, phases, 10**12, seed))
    print(f"{climbs} climbs, {prefixes:,} prefixes")
    for kind in KINDS:
        print(f"{kind}: largest deviation {worst[kind]:.3f}, at 10^12 samples {far[kind]:.3f}")


if __name__ == "__main__":
    main()
