"""Tests for train.data.loader: the same samples on any ranks, and no hidden failure."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from tests.support.training import write_tokens
from train import DataOrder
from train.data.loader import Batches
from train.data.split import Split
from train.optim.schedule import BatchSchedule

T = 8
VALUES = (np.arange(1000) % 60000).astype(np.uint16)
ORDER = DataOrder(n_tokens=len(VALUES), block_size=T, seed=1)
CPU = torch.device("cpu")


def write_stream(folder: Path, values: np.ndarray) -> TokenStream:
    """Write the values to three shards, whose borders are inside windows."""
    n = len(values)
    parts = np.split(values, [n // 3 + 1, n // 2 + 2])
    write_tokens(folder, {"train": parts, "val": [values[:1]]})
    return TokenStream(folder, "train")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    return write_stream(tmp_path_factory.mktemp("tokens"), VALUES)


def load(
    stream: Any,
    split: Split,
    rank: int,
    spans: Sequence[tuple[int, int]],
    order: DataOrder = ORDER,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    steps = [(step, *span) for step, span in enumerate(spans)]
    with Batches(stream, order, split, rank=rank, spans=steps, device=CPU) as batches:
        found = list(batches)
    micro_steps = [split.micro_steps(count) for _, count in spans]
    assert [batch.step for batch in found] == np.repeat(range(len(spans)), micro_steps).tolist()
    return [(batch.inputs, batch.targets) for batch in found]


def rows_of_steps(stream: TokenStream, world: int, micro_batch: int) -> np.ndarray:
    """The windows of all ranks in three steps of 24, in the order of samples, (72, T)."""
    split = Split(world=world, micro_batch=micro_batch)
    spans = [(24 * step, 24) for step in range(3)]
    ranks = [load(stream, split, rank, spans) for rank in range(world)]
    micro_steps = zip(*ranks, strict=True)
    return np.concatenate([inputs.numpy() for batches in micro_steps for inputs, _ in batches])


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 8), (2, 3), (3, 8), (4, 2), (8, 3)])
def test_samples_do_not_depend_on_ranks_and_micro_batch(
    stream: TokenStream, world: int, micro_batch: int
) -> None:
    expected = rows_of_steps(stream, 1, 24)
    assert np.array_equal(rows_of_steps(stream, world, micro_batch), expected)


def test_inputs_and_targets_follow_the_sampling_order(stream: TokenStream) -> None:
    ((inputs, targets),) = load(stream, Split(world=1, micro_batch=4), 0, [(0, 4)])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    for row, target, window in zip(inputs, targets, ORDER.samples(0, 4), strict=True):
        assert row.tolist() == VALUES[window * T : window * T + T].tolist()
        assert target.tolist() == VALUES[window * T + 1 : window * T + T + 1].tolist()


def test_an_epoch_over_1_3_and_8_ranks_sees_each_window_once(tmp_path: Path) -> None:
    """The number of ranks changes twice, while the batch grows."""
    schedule = BatchSchedule(full=96, doublings=2, ramp_steps=4)  # 24 24 48 48 96 96 ...
    n = schedule(8)[0]
    assert n == 2 * 24 + 2 * 48 + 4 * 96
    values = np.arange(n * T + 1).astype(np.uint16)
    stream = write_stream(tmp_path, values)
    order = DataOrder(n_tokens=len(values), block_size=T, seed=2)
    assert order.n_windows == n
    seen: list[int] = []
    for world, micro_batch, steps in ((1, 6, range(3)), (3, 4, range(3, 5)), (8, 3, range(5, 8))):
        split = Split(world=world, micro_batch=micro_batch)
        spans = [schedule(step) for step in steps]
        for rank in range(world):
            for inputs, targets in load(stream, split, rank, spans, order):
                assert torch.equal(inputs + 1, targets)
                seen += (inputs[:, 0] // T).tolist()
    assert sorted(seen) == list(range(n))


def test_an_error_in_the_thread_is_raised_by_next(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, VALUES)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin: no such file"):
        load(stream, Split(world=1, micro_batch=2), 0, [(0, ORDER.n_windows // 2 * 2)])


def test_closing_early_ends_the_thread(stream: TokenStream) -> None:
    split, spans = Split(world=1, micro_batch=1), [(0, 0, 4)] * 10**6
    with Batches(stream, ORDER, split, rank=0, spans=spans, device=CPU) as batches:
        next(batches)
        assert batches.waited > 0
    assert "batches" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(stream: TokenStream) -> None:
    split, spans = Split(world=1, micro_batch=4), [(0, 64)]
    device = torch.device("cuda", 0)
    with Batches(stream, ORDER, split, rank=0, spans=[(0, *spans[0])], device=device) as batches:
        for (_, *on_gpu), on_cpu in zip(batches, load(stream, split, 0, spans), strict=True):
            assert all(part.device == device for part in on_gpu)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))
