"""Search for mixtures with counts far from the ideal: `python -m tests.benchmarks.mixture`.

Each climb starts from random weights, phases and seed, and changes one of them at a time as long as
the largest deviation over all prefixes of the run does not fall.
"""

from __future__ import annotations

import argparse
import random
import time
from fractions import Fraction

import numpy as np

from train.data.mixture import Mixture

Phases = list[tuple[float, list[float]]]

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


def main() -> None:
    """Climb for some seconds, and print the largest deviation of one phase, and of several."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, end = random.Random(args.seed), time.monotonic() + args.seconds
    worst, climbs, prefixes = {False: 0.0, True: 0.0}, 0, 0
    while time.monotonic() < end:
        n, count = rng.randint(2, 20), rng.choice((1, 1, 2, 3, 4, 5, 6))
        samples, seed = rng.choice((60, 300, 1000, 3000)), rng.randrange(2**31)
        borders = [*sorted(rng.random() for _ in range(count - 1)), 1.0]
        phases = [(until, some_weights(rng, n)) for until in borders]
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
        worst[count > 1] = max(worst[count > 1], best)
    print(
        f"{climbs} climbs, {prefixes:,} prefixes: largest deviation {worst[False]:.3f} in one "
        f"phase, {worst[True]:.3f} in several"
    )


if __name__ == "__main__":
    main()
