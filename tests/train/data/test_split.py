"""Tests for train.data.split: how a global batch is split."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from train.data.split import Split, divisors

T = 8


def test_a_split_is_planned() -> None:
    assert Split.plan(512, T, 8, None, 16) == Split(world=8, micro_batch=16)
    assert Split.plan(512, T, 8, None, 16).micro_steps(512) == 4
    assert Split.plan(12, T, 2, None, 4).micro_batch == 3
    assert Split.plan(14, T, 2, None, 5).micro_batch == 1
    assert Split.plan(14, T, 2, 7, 1).micro_batch == 7
    assert Split.plan(4, T, 1, None, 0).micro_batch == 1


def test_leaves_are_contiguous_and_shared_as_evenly_as_they_can_be() -> None:
    windows = np.arange(22)
    for world in (1, 2, 3, 4, 5, 8, 11):
        split = Split.of_leaves(22, 2, world, "batch")
        shares = [split.share(windows, rank) for rank in range(world)]
        assert np.concatenate(shares).ravel().tolist() == windows.tolist()
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == split.micro_steps(22)
    for leaf, world in ((3, 1), (2, 12)):
        with pytest.raises(UserError, match=r"train\.invariant"):
            Split.of_leaves(22, leaf, world, "batch")
    with pytest.raises(UserError, match="set 2, or set processes"):
        Split.of_leaves(32, 4, 9, "batch")
    with pytest.raises(UserError, match="too few for 40 processes; set processes"):
        Split.of_leaves(32, 4, 40, "batch")


def test_divisors() -> None:
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
