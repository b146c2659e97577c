"""Tests for train.data.mixture: shares at every prefix, random access, and the phases' borders."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import validate
from tests.benchmarks.mixture import deviation
from train.data.mixed_order import MixedOrder
from train.data.mixture import Mixture
from train.data.order import DataOrder
from train.data.phases import check_names
from train.params import TrainParams

Phases = list[tuple[float, list[float]]]

WEIGHT = st.one_of(
    st.just(0.0), st.integers(1, 20).map(float), st.floats(1e-6, 1.0).map(lambda w: round(w, 9))
)


@st.composite
def mixtures(draw: st.DrawFn) -> Phases:
    n = draw(st.integers(2, 20))
    weights = st.lists(WEIGHT, min_size=n, max_size=n).filter(any)
    borders = sorted(draw(st.sets(st.integers(1, 99), max_size=5)))
    return [(until / 100, draw(weights)) for until in (*borders, 100)]


def borders(phases: Phases, samples: int) -> list[int]:
    return [0, *(round(Fraction(repr(until)) * samples) for until, _ in phases)]


def ideal(phases: Phases, samples: int, at: int) -> list[Fraction]:
    """Ideal counts of the sources after the first samples: an independent computation."""
    counts = [Fraction(0)] * len(phases[0][1])
    ends = borders(phases, samples)
    for (_, weights), first, end in zip(phases, ends, ends[1:], strict=False):
        exact = [Fraction(repr(weight)) for weight in weights]
        seen = max(0, min(at, end) - first)
        counts = [n + w / sum(exact) * seen for n, w in zip(counts, exact, strict=True)]
    return counts


@settings(deadline=None, max_examples=60)
@given(phases=mixtures(), samples=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_shares_are_near_the_ideal_at_every_prefix(phases: Phases, samples: int, seed: int) -> None:
    mixture = Mixture(phases, samples, seed)
    assert mixture.bound == 2 or len(phases) > 1
    sources, numbers = mixture.samples(0, samples)
    counts = [0] * len(phases[0][1])
    for at, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
        assert number == counts[source]  # each sample of a source once, in order
        counts[source] += 1
        if at % 7 == 0 or at == samples - 1:
            assert counts == mixture.counts(at + 1)
            expected = ideal(phases, samples, at + 1)
            assert max(abs(n - e) for n, e in zip(counts, expected, strict=True)) <= mixture.bound
    ends = borders(phases, samples)
    for (_, weights), first, end in zip(phases, ends, ends[1:], strict=False):
        of_phase = set(sources[first:end].tolist())
        assert of_phase <= {source for source, weight in enumerate(weights) if weight}


@settings(deadline=None)
@given(
    phases=mixtures(),
    seed=st.integers(0, 2**32 - 1),
    part=st.floats(0, 1),
    cut=st.integers(0, 40),
)
def test_any_sample_of_a_trillion_is_found_alone(
    phases: Phases, seed: int, part: float, cut: int
) -> None:
    samples = 10**12
    mixture, start = Mixture(phases, samples, seed), int(part * (samples - 40))
    at_once = mixture.samples(start, 40)
    parts = [mixture.samples(start, cut), mixture.samples(start + cut, 40 - cut)]
    for whole, *pieces in zip(at_once, *parts, strict=True):
        assert np.array_equal(whole, np.concatenate(pieces))
    counts = mixture.counts(start)
    expected = ideal(phases, samples, start)
    assert sum(counts) == start
    assert max(abs(n - e) for n, e in zip(counts, expected, strict=True)) <= mixture.bound
    for source, number in zip(*(values.tolist() for values in at_once), strict=True):
        assert number == counts[source]
        counts[source] += 1
    assert counts == mixture.counts(start + 40)


@pytest.mark.parametrize("rounds", [0, 1, 50])
@pytest.mark.parametrize("sign", [1, -1])
def test_phases_that_drop_the_source_just_rounded_up_stay_within_two(
    rounds: int, sign: int
) -> None:
    n = 20
    lengths = [*(rounds * left + 1 for left in range(n, 1, -1)), 10]
    ends, samples = np.cumsum(lengths).tolist(), sum(lengths)
    alive, phases, before = set(range(n)), list[tuple[float, list[float]]](), [0] * n
    for end in ends:
        weights = [float(source in alive) for source in range(n)]
        phases.append((end / samples, weights))
        if len(alive) > 1:
            counts = Mixture([*phases, (1.0, weights)], samples, 0).counts(end)
            alive.remove(max(alive, key=lambda s, c=counts: sign * (c[s] - before[s])))  # type: ignore[misc]
            before = counts
    assert deviation(phases, samples, seed=0) <= 2


def test_a_source_that_swaps_could_take_too_far_is_not_swapped() -> None:
    """Weights that grow as Fibonacci's numbers give the tree with the largest error."""
    weights = [0.01, 1.0, 1.0, 1.03]
    while len(weights) < 16:
        weights.append(round(weights[-1] + weights[-2], 6))
    mixture = Mixture([(1.0, weights)], 20_000, seed=1)
    assert mixture.bound == 2
    assert deviation([(1.0, weights)], 20_000, seed=1) <= 2


def test_a_phase_begins_exactly_at_its_border() -> None:
    mixture = Mixture([(0.3, [1.0, 0.0]), (0.6, [1.0, 1.0]), (1.0, [0.0, 1.0])], 1001, seed=3)
    sources, _ = mixture.samples(0, 1001)
    assert set(sources[:300].tolist()) == {0}
    assert set(sources[601:].tolist()) == {1}
    assert mixture.counts(601) in ([450, 151], [451, 150])
    assert mixture.counts(1001)[0] == mixture.counts(601)[0]


def test_the_samples_have_no_fixed_rhythm_and_depend_on_the_seed() -> None:
    one, other = (Mixture([(1.0, [1.0, 1.0])], 1000, seed).samples(0, 1000)[0] for seed in (1, 2))
    runs = {tuple(one[i : i + 2].tolist()) for i in range(0, 1000, 2)}
    assert runs == {(0, 1), (1, 0)}
    assert not np.array_equal(one, other)


def params(**changes: Any) -> TrainParams:
    values = {"steps": 10, "batch_tokens": 80, "val_tokens": 1, "learning_rate": 1e-3, **changes}
    return TrainParams.model_validate(values)


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_each_source_is_read_epoch_by_epoch_wherever_it_begins(kind: str) -> None:
    """The windows of a source do not depend on the other sources, nor on the weights."""
    tokens, block = {"a": 301, "b": 5, "c": 98}, 10
    mixture = Mixture([(0.5, [3.0, 0.0, 1.0]), (1.0, [1.0, 0.0, 4.0])], 1000, seed=1)
    order = MixedOrder(mixture, tokens, block, params(seed=5, order=kind))
    assert order.windows == [30, 0, 9]
    starts, found = order.starts(0, 1000), order.locate(0, 1000)
    for source, begin in ((0, 0), (2, 306)):
        of_source = starts[found.sources == source] - begin
        name = "abc"[source]
        alone = DataOrder(
            n_tokens=tokens[name],
            block_size=block,
            seed=5,
            name=name,
            order=kind,  # type: ignore[arg-type]
        )
        assert np.array_equal(of_source, alone.starts(0, len(of_source)))
        n = alone.n_windows
        for epoch in range(len(of_source) // n):
            windows = of_source[epoch * n : epoch * n + n] // block
            assert sorted(windows.tolist()) == list(range(n))
    by_parts = [order.starts(at, 100) for at in range(0, 1000, 100)]
    assert np.array_equal(starts, np.concatenate(by_parts))
    shares = order.shares(1000)
    assert sum(share.tokens for share in shares.values()) == 10_000
    assert shares["c"].epochs == pytest.approx(shares["c"].tokens / block / 9)


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        (3, "mixture"),
        ({}, "mixture"),
        ([], "mixture"),
        ({"web": -1}, "web"),
        ({"web": "7"}, "web"),
        ({"web": True}, "web"),
        ({"web": float("nan")}, "web"),
        ({"web": float("inf")}, "web"),
        ({"web": 10**400}, "web"),
        ({"web": 0, "code": 0}, "mixture"),
        ({"weights": {"web": 1}}, "weights"),
        ({"until": 1.0, "weights": {"web": 1}}, "weights"),
        ([{"until": 1.0}], "mixture: 0"),
        ([{"until": 0.5, "weights": {"web": 1}}], "0.until"),
        ([{"until": 0, "weights": {"web": 1}}], "0.until"),
        ([{"until": 1.0, "weights": {"web": 1}}] * 2, "1.until"),
        ([{"until": 0.5, "weights": {"web": 1}}, {"until": 1.0, "weights": {"web": 0}}], "1.weig"),
        ([{"until": "0.5", "weights": {"web": 1}}], "0.until"),
        ([{"until": 1.0, "weights": [1]}], "0.weights"),
        ([{"until": 1.0, "weights": {1: 1}}], "0.weights.1"),
    ],
)
def test_an_impossible_mixture_is_refused_in_one_line(mixture: Any, named: str) -> None:
    values = {"steps": 10, "batch_tokens": 80, "val_tokens": 1, "learning_rate": 1e-3}
    with pytest.raises(UserError, match=r"^params\.yaml: train\.mixture: ") as error:
        validate(TrainParams, {**values, "mixture": mixture}, "params.yaml: train")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        ({"web": 1}, "train.mixture.code: missing"),
        ({"web": 1, "codes": 2}, "train.mixture.codes: .*code"),
        ([{"until": 1.0, "weights": {"web": 1}}], "train.mixture.0.weights.code: missing"),
    ],
)
def test_a_mixture_weighs_exactly_the_sources(mixture: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_names(params(mixture=mixture).mixture, ["code", "web"])
    check_names(params(mixture={"web": 1, "code": 0}).mixture, ["code", "web"])
    check_names(None, ["code", "web"])


def test_equal_mixtures_have_one_value() -> None:
    """The run's key does not depend on the order of names, nor on how a number is written."""
    assert [*params(mixture={"b": 1, "a": 2}).mixture] == ["a", "b"]
    values = [params(mixture={"b": b, "a": 2}).deciding() for b in (1, 1.0)]
    assert str(values[0]) == str(values[1])
