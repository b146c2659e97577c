"""Tests for train.validation: the same targets, each once, for any world and batch size."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.loss import IGNORE_INDEX
from train.validation import fixed_batches, mean_loss, windows

STREAM = np.arange(5000).astype(np.uint16)


@given(
    n=st.integers(1, 4999),
    block=st.integers(1, 400),
    rows=st.integers(1, 6),
    world=st.integers(1, 5),
)
def test_every_target_is_measured_exactly_once(n: int, block: int, rows: int, world: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        for inputs, targets in fixed_batches(STREAM, n, block, rows, rank=rank, world=world):
            assert inputs.shape == targets.shape == (rows, block)
            counted = targets != IGNORE_INDEX
            assert torch.equal(inputs[counted] + 1, targets[counted])
            seen += targets[counted].tolist()
    assert len(set(seen)) == len(seen) == n
    if n > block:  # from the first target of the split to its last
        assert {1, 4999} <= set(seen)


@pytest.mark.parametrize("n", [4096, 65536, 10_485_760])
@pytest.mark.parametrize("n_tokens", [10_485_761, 20_600_000, 10**11])
def test_the_measured_targets_are_spread_evenly_over_the_split(n: int, n_tokens: int) -> None:
    measured = windows(n_tokens, n, 128)
    starts = np.array([start for start, _ in measured])
    assert all(count == 128 for _, count in measured)
    assert (starts[0], starts[-1] + 128) == (0, n_tokens - 1)
    spans = max(16, n // 1024)
    gaps = np.diff(starts) - 128
    between = gaps[len(measured) // spans - 1 :: len(measured) // spans]
    assert len(between) == spans - 1
    assert np.ptp(between) <= 1
    assert gaps.sum() == between.sum()  # none between the windows of a span


def test_the_measured_targets_are_the_same_for_all_usual_contexts() -> None:
    targets = {
        block: {t for start, n in windows(147_280, 65536, block) for t in range(start, start + n)}
        for block in (64, 128, 512, 1024)
    }
    assert all(found == targets[1024] for found in targets.values())


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_loss_is_the_mean_over_all_targets(rows: int) -> None:
    def forward(inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> Any:
        assert reduction == "sum"
        return targets[targets != IGNORE_INDEX].sum().float()

    stream = STREAM[:101]
    loss = mean_loss(
        forward, stream, 100, block_size=7, rows=rows, dtype="float32", device=torch.device("cpu")
    )
    assert loss == pytest.approx(50.5)
