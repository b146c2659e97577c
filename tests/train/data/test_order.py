"""Tests for train.data.order: a bijection of any size, with values that never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import DataOrder
from train.data.order import permute, round_keys

UINT64 = st.integers(0, 2**64 - 1)


@given(n=st.integers(1, 3000), keys=st.lists(UINT64, min_size=8, max_size=8))
def test_permute_is_a_bijection(n: int, keys: list[int]) -> None:
    image = permute(np.arange(n), n, np.array(keys, dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(1, 2**62), first=st.integers(0, 2**62))
def test_permute_is_injective_and_in_range_at_any_size(n: int, first: int) -> None:
    index = np.arange(first % n, min(n, first % n + 50))
    image = permute(index, n, np.arange(8, dtype=np.uint64))
    assert image.min() >= 0
    assert image.max() < n
    assert len(np.unique(image)) == len(index)


def test_a_trillion_tokens_are_sampled_without_repeats_within_an_epoch() -> None:
    order = DataOrder(n_tokens=10**12, block_size=1024, seed=1)
    count = 300_000  # drawn at random, 46 windows would repeat
    before, after = np.split(order.samples(order.n_windows - count, 2 * count), 2)
    for windows in (before, after):
        assert len(np.unique(windows)) == count
        assert 0 <= windows.min() <= windows.max() < order.n_windows
        assert abs(windows.mean() / order.n_windows - 0.5) < 0.01
    assert not np.array_equal(before, after)


@given(
    tokens=st.integers(10, 400),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 1000),
    cut=st.integers(0, 60),
)
def test_samples_do_not_depend_on_how_they_are_requested(
    tokens: int, block: int, seed: int, start: int, cut: int
) -> None:
    order = DataOrder(n_tokens=tokens, block_size=block, seed=seed)
    at_once = order.samples(start, 60)
    assert np.array_equal(
        at_once, np.concatenate([order.samples(start, cut), order.samples(start + cut, 60 - cut)])
    )


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_every_epoch_has_every_window_once(kind: str) -> None:
    order = DataOrder(n_tokens=10_001, block_size=10, seed=7, order=kind)  # type: ignore[arg-type]
    n = order.n_windows
    assert n == 1000
    epochs = order.samples(0, 3 * n).reshape(3, n)
    assert order.samples(0, 3 * n).dtype == np.int64
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    if kind == "sequential":
        assert np.array_equal(epochs[0], np.arange(n))
    else:
        assert (epochs[0] != epochs[1]).mean() > 0.99


def test_the_last_window_ends_inside_the_stream() -> None:
    for tokens in range(11, 40):
        order = DataOrder(n_tokens=tokens, block_size=10, seed=0)
        assert order.samples(0, order.n_windows).max() * 10 + 11 <= tokens


def test_the_order_matches_golden_values() -> None:
    """A changed order would silently change the data of every resumed run."""
    order = DataOrder(n_tokens=1_000_001, block_size=100, seed=1337)
    assert order.samples(0, 8).tolist() == [2674, 9431, 7464, 4719, 853, 4908, 4341, 3190]
    border = [2070, 4209, 2423, 1741, 5951, 8579, 9133, 5369]  # of the first epoch
    assert order.samples(10_000 - 4, 8).tolist() == border
    huge = DataOrder(n_tokens=10**13, block_size=1024, seed=2**32 - 1)
    assert huge.samples(10**9, 3).tolist() == [1557298931, 8463298804, 8036040850]


def test_seed_and_epoch_are_independent() -> None:
    """seed + epoch would make (0, epoch 1) equal (1, epoch 0)."""
    one = DataOrder(n_tokens=10_001, block_size=10, seed=0).samples(1000, 1000)
    other = DataOrder(n_tokens=10_001, block_size=10, seed=1).samples(0, 1000)
    assert (one != other).mean() > 0.99


def test_keys_of_a_source_are_those_of_nothing_else() -> None:
    """Also of a source named `mixture`: the order of the sources has keys of that name."""
    order = DataOrder(n_tokens=101, block_size=1, seed=3, name="mixture")
    others = permute(np.arange(100), 100, round_keys(3, 0, "mixture"))
    assert not np.array_equal(order.samples(0, 100), others)


def test_the_order_looks_random() -> None:
    """Neighbours are far apart, and each part of an epoch samples the whole split."""
    n = 100_000
    windows = DataOrder(n_tokens=n + 1, block_size=1, seed=5).samples(0, n)
    assert np.abs(np.diff(windows)).mean() == pytest.approx(n / 3, rel=0.02)
    assert abs(np.corrcoef(np.arange(n), windows)[0, 1]) < 0.02
    for part in np.array_split(windows, 10):
        assert part.mean() == pytest.approx(n / 2, rel=0.03)


def test_all_permutations_of_a_small_domain_occur() -> None:
    seen = {
        tuple(DataOrder(n_tokens=5, block_size=1, seed=seed).samples(0, 4)) for seed in range(400)
    }
    assert len(seen) == 24


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"n_tokens": 10, "block_size": 10, "seed": 0}, "window"),
        ({"n_tokens": 10, "block_size": 0, "seed": 0}, "block_size"),
        ({"n_tokens": 10, "block_size": 2, "seed": -1}, "seed"),
    ],
)
def test_impossible_orders_are_refused(kwargs: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        DataOrder(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        DataOrder(n_tokens=10, block_size=2, seed=0).samples(-1, 2)
