"""Of train.order: a bijection for any size, the same for ever."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import DataOrder
from train.data.order import permute

GOLDEN_START = [2674, 9431, 7464, 4719, 853, 4908, 4341, 3190]
GOLDEN_BORDER = [2070, 4209, 2423, 1741, 5951, 8579, 9133, 5369]
GOLDEN_HUGE = [1557298931, 8463298804, 8036040850]

UINT64 = st.integers(0, 2**64 - 1)


@given(n=st.integers(1, 3000), keys=st.lists(UINT64, min_size=8, max_size=8))
def test_permute_is_a_bijection(n: int, keys: list[int]) -> None:
    image = permute(np.arange(n), n, np.array(keys, dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(1, 2**62), first=st.integers(0, 2**62))
def test_permute_stays_inside_and_apart_at_any_size(n: int, first: int) -> None:
    index = np.arange(first % n, min(n, first % n + 50))
    image = permute(index, n, np.arange(8, dtype=np.uint64))
    assert image.min() >= 0
    assert image.max() < n
    assert len(np.unique(image)) == len(index)


@pytest.mark.parametrize("n_tokens", [10**12, 10**18])
def test_a_trillion_tokens_are_read_without_repeats_also_across_epochs(n_tokens: int) -> None:
    order = DataOrder(n_tokens=n_tokens, block_size=1024, seed=1)
    count = 300_000  # of a trillion's windows: drawn at random, 46 would come twice
    before, after = np.split(order.samples(order.n_windows - count, 2 * count), 2)
    for windows in (before, after):
        assert len(np.unique(windows)) == count
        assert 0 <= windows.min() <= windows.max() < order.n_windows
        assert abs(windows.mean() / order.n_windows - 0.5) < 0.01
        assert (windows * 1024).min() >= 0  # the first tokens fit as well
    assert not np.array_equal(before, after)


@given(
    tokens=st.integers(10, 400),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 1000),
    cut=st.integers(0, 60),
)
def test_any_cut_of_the_samples_reads_the_same(
    tokens: int, block: int, seed: int, start: int, cut: int
) -> None:
    order = DataOrder(n_tokens=tokens, block_size=block, seed=seed)
    whole = order.samples(start, 60)
    assert np.array_equal(
        whole, np.concatenate([order.samples(start, cut), order.samples(start + cut, 60 - cut)])
    )


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_each_epoch_sees_each_window_once(kind: str) -> None:
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


def test_windows_over_ranks_of_a_changing_world_are_each_seen_once() -> None:
    order = DataOrder(n_tokens=24 * 40 + 1, block_size=40, seed=3)
    seen, start = [], 0
    for world, steps in ((1, 1), (3, 1), (2, 1)):
        batch = 8 if world != 3 else 8 - 8 % 3 + 3 - 1  # 8 either way
        for _ in range(steps):
            parts = np.array_split(order.samples(start, batch), world)
            seen += [w for part in parts for w in part]
            start += batch
    assert sorted(seen) == list(range(24))


def test_the_last_window_ends_inside_the_stream() -> None:
    for tokens in range(11, 40):
        order = DataOrder(n_tokens=tokens, block_size=10, seed=0)
        assert order.samples(0, order.n_windows).max() * 10 + 11 <= tokens


def test_values_never_change() -> None:
    """Golden values: another order would silently change what every resumed run reads."""
    order = DataOrder(n_tokens=1_000_001, block_size=100, seed=1337)
    assert order.samples(0, 8).tolist() == GOLDEN_START
    assert order.samples(10_000 - 4, 8).tolist() == GOLDEN_BORDER
    assert (
        DataOrder(n_tokens=10**13, block_size=1024, seed=2**32 - 1).samples(10**9, 3).tolist()
        == GOLDEN_HUGE
    )


def test_seed_and_epoch_do_not_mix() -> None:
    """seed + epoch would make (0, epoch 1) equal (1, epoch 0)."""
    one = DataOrder(n_tokens=10_001, block_size=10, seed=0).samples(1000, 1000)
    other = DataOrder(n_tokens=10_001, block_size=10, seed=1).samples(0, 1000)
    assert (one != other).mean() > 0.99


def test_it_looks_shuffled() -> None:
    """Neighbours end up far apart, and every place is reached from everywhere."""
    n = 100_000
    windows = DataOrder(n_tokens=n + 1, block_size=1, seed=5).samples(0, n)
    assert np.abs(np.diff(windows)).mean() == pytest.approx(n / 3, rel=0.02)
    assert abs(np.corrcoef(np.arange(n), windows)[0, 1]) < 0.02
    for part in np.array_split(windows, 10):
        assert part.mean() == pytest.approx(n / 2, rel=0.03)


def test_small_domains_reach_all_their_permutations() -> None:
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


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
