"""Tests for train.validation: the same targets, each once, for any world and batch size."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.loss import IGNORE_INDEX
from train.validation import fixed_batches, mean_loss

STREAM = np.arange(5000).astype(np.uint16)


@given(
    n=st.integers(1, 300),
    block=st.integers(1, 20),
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
    assert sorted(seen) == list(range(1, n + 1))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_loss_is_the_mean_over_all_targets(rows: int) -> None:
    def forward(inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> Any:
        assert reduction == "sum"
        return targets[targets != IGNORE_INDEX].sum().float()

    loss = mean_loss(
        forward, STREAM, 100, block_size=7, rows=rows, dtype="float32", device=torch.device("cpu")
    )
    assert loss == pytest.approx(50.5)
