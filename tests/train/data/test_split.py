"""Tests for train.data.split: how a global batch is split."""

from __future__ import annotations

from train.data.split import Split, divisors

T = 8


def test_a_split_is_planned() -> None:
    assert Split.plan(512, T, 8, None, 16) == Split(world=8, micro_batch=16)
    assert Split.plan(512, T, 8, None, 16).micro_steps(512) == 4
    assert Split.plan(12, T, 2, None, 4).micro_batch == 3
    assert Split.plan(14, T, 2, None, 5).micro_batch == 1
    assert Split.plan(14, T, 2, 7, 1).micro_batch == 7
    assert Split.plan(4, T, 1, None, 0).micro_batch == 1


def test_divisors() -> None:
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
