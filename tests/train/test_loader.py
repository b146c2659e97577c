"""Of train.loader: the same samples whoever computes them, and no hidden failure."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from train import DataOrder
from train.loader import Batches, Split, read_windows

T = 8
STREAM = (np.arange(1000) % 60000).astype(np.uint16)
ORDER = DataOrder(n_tokens=len(STREAM), block_size=T, seed=1)
CPU = torch.device("cpu")


def load(
    split: Split, rank: int, start: int = 0, steps: int = 3, stream: Any = STREAM
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with Batches(stream, ORDER, split, rank=rank, start=start, steps=steps, device=CPU) as batches:
        return list(batches)


def rows_of_steps(world: int, micro_batch: int, start: int = 0, steps: int = 3) -> np.ndarray:
    """(steps, 24, T): what all ranks read, put back into the order of samples."""
    split = Split(batch=24, world=world, micro_batch=micro_batch)
    ranks = [load(split, rank, start, steps) for rank in range(world)]
    rows = []
    for step in range(steps):
        for m in range(split.micro_steps):
            for rank in range(world):
                rows.append(ranks[rank][step * split.micro_steps + m][0].numpy())
    return np.concatenate(rows).reshape(steps, 24, T)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 8), (2, 3), (3, 8), (4, 2), (8, 3)])
def test_the_samples_do_not_depend_on_who_computes_them(world: int, micro_batch: int) -> None:
    assert np.array_equal(rows_of_steps(world, micro_batch), rows_of_steps(1, 24))


def test_resuming_at_any_sample_reads_on() -> None:
    steps = 4
    whole = rows_of_steps(1, 24, steps=steps)
    for done in range(steps):
        rest = rows_of_steps(2, 4, start=done * 24, steps=steps - done)
        assert np.array_equal(rest, whole[done:])


def test_inputs_and_targets_are_the_windows_of_the_order() -> None:
    (inputs, targets), *_ = load(Split(batch=4, world=1, micro_batch=4), 0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    for row, target, window in zip(inputs, targets, ORDER.samples(0, 4), strict=True):
        assert row.tolist() == STREAM[window * T : window * T + T].tolist()
        assert target.tolist() == STREAM[window * T + 1 : window * T + T + 1].tolist()


def test_an_epoch_over_a_changing_world_sees_each_window_once() -> None:
    order = DataOrder(n_tokens=12 * T * 4 + 1, block_size=T, seed=2)
    assert order.n_windows == 48
    stream = np.arange(12 * T * 4 + 1).astype(np.uint16)
    seen, start = [], 0
    for world, micro_batch, steps in ((1, 4, 1), (3, 2, 2), (2, 3, 1)):
        split = Split(batch=12, world=world, micro_batch=micro_batch)
        for rank in range(world):
            with Batches(
                stream, order, split, rank=rank, start=start, steps=steps, device=CPU
            ) as batches:
                seen += [int(x) // T for inputs, _ in batches for x in inputs[:, 0]]
        start += 12 * steps
    assert sorted(seen) == list(range(48))


def test_an_error_of_the_thread_is_raised_in_the_loop() -> None:
    class Broken:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, part: slice) -> np.ndarray:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        load(Split(batch=4, world=1, micro_batch=2), 0, stream=Broken())


def test_leaving_early_ends_the_thread() -> None:
    split = Split(batch=4, world=1, micro_batch=1)
    with Batches(STREAM, ORDER, split, rank=0, start=0, steps=10**6, device=CPU) as batches:
        next(batches)
    assert "batches" not in [thread.name for thread in threading.enumerate()]


def test_windows_are_read_one_below_the_other() -> None:
    rows = read_windows(STREAM, np.array([0, 123]), T)
    assert rows.shape == (2, T + 1)
    assert rows[1].tolist() == STREAM[123 * T : 123 * T + T + 1].tolist()


def test_a_split_is_planned() -> None:
    assert Split.plan(512, T, 8, None, 16) == Split(batch=512, world=8, micro_batch=16)
    assert Split.plan(512, T, 8, None, 16).micro_steps == 4
    assert Split.plan(12, T, 2, None, 4).micro_batch == 3
    assert Split.plan(14, T, 2, None, 5).micro_batch == 1
    assert Split.plan(14, T, 2, 7, 1).micro_batch == 7
    assert Split.plan(4, T, 1, None, 0).micro_batch == 1


@pytest.mark.parametrize(
    ("batch", "world", "micro_batch", "words"),
    [
        (16, 3, None, ["batch_tokens: 128 are 16", "120 or 144", "PROCESSES) to 2 or 4"]),
        (2, 4, None, ["batch_tokens: 16 are 2", "nearest: 32,", "1 or 2"]),
        (16, 2, 3, ["micro_batch", "2 or 4"]),
    ],
)
def test_impossible_splits_are_refused_with_the_nearest(
    batch: int, world: int, micro_batch: int | None, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        Split.plan(batch, T, world, micro_batch, 16)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
