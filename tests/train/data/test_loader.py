"""Of train.loader: the same samples whoever computes them, and no hidden failure."""

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
from train.data.loader import Batches, read_windows
from train.data.split import Split, divisors
from train.optim.schedule import BatchSchedule

T = 8
VALUES = (np.arange(1000) % 60000).astype(np.uint16)
ORDER = DataOrder(n_tokens=len(VALUES), block_size=T, seed=1)
CPU = torch.device("cpu")


def write_stream(folder: Path, values: np.ndarray) -> TokenStream:
    """The values in three shards, whose borders lie inside windows."""
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
    with Batches(stream, order, split, rank=rank, spans=spans, device=CPU) as batches:
        return list(batches)


def rows_of_steps(
    stream: TokenStream, world: int, micro_batch: int, start: int = 0, steps: int = 3
) -> np.ndarray:
    """(steps, 24, T): what all ranks read, put back into the order of samples."""
    split = Split(world=world, micro_batch=micro_batch)
    spans = [(start + 24 * step, 24) for step in range(steps)]
    ranks = [load(stream, split, rank, spans) for rank in range(world)]
    rows = []
    for step in range(steps):
        for m in range(split.micro_steps(24)):
            for rank in range(world):
                rows.append(ranks[rank][step * split.micro_steps(24) + m][0].numpy())
    return np.concatenate(rows).reshape(steps, 24, T)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 8), (2, 3), (3, 8), (4, 2), (8, 3)])
def test_the_samples_do_not_depend_on_who_computes_them(
    stream: TokenStream, world: int, micro_batch: int
) -> None:
    whole = rows_of_steps(stream, 1, 24)
    assert np.array_equal(rows_of_steps(stream, world, micro_batch), whole)


def test_resuming_at_any_sample_reads_on(stream: TokenStream) -> None:
    steps = 4
    whole = rows_of_steps(stream, 1, 24, steps=steps)
    for done in range(steps):
        rest = rows_of_steps(stream, 2, 4, start=done * 24, steps=steps - done)
        assert np.array_equal(rest, whole[done:])


def test_inputs_and_targets_are_the_windows_of_the_order(stream: TokenStream) -> None:
    ((inputs, targets),) = load(stream, Split(world=1, micro_batch=4), 0, [(0, 4)])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    for row, target, window in zip(inputs, targets, ORDER.samples(0, 4), strict=True):
        assert row.tolist() == VALUES[window * T : window * T + T].tolist()
        assert target.tolist() == VALUES[window * T + 1 : window * T + T + 1].tolist()


@pytest.mark.parametrize("seed", [2, 3])
def test_an_epoch_over_1_3_and_8_ranks_sees_each_window_once(tmp_path: Path, seed: int) -> None:
    """The world changes in the middle, twice, and the batch grows while it does."""
    schedule = BatchSchedule(full=96, doublings=2, ramp_steps=4)  # 24 24 48 48 96 96 ...
    n = schedule(8)[0]
    assert n == 2 * 24 + 2 * 48 + 4 * 96
    values = np.arange(n * T + 1).astype(np.uint16)
    stream = write_stream(tmp_path, values)
    order = DataOrder(n_tokens=len(values), block_size=T, seed=seed)
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


def test_an_error_of_the_thread_is_raised_in_the_loop(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, VALUES)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin: no such file"):
        load(stream, Split(world=1, micro_batch=2), 0, [(0, ORDER.n_windows // 2 * 2)])


def test_leaving_early_ends_the_thread(stream: TokenStream) -> None:
    split, spans = Split(world=1, micro_batch=1), [(0, 4)] * 10**6
    with Batches(stream, ORDER, split, rank=0, spans=spans, device=CPU) as batches:
        next(batches)
        assert batches.waited > 0
    assert "batches" not in [thread.name for thread in threading.enumerate()]


def test_windows_are_read_one_below_the_other(stream: TokenStream) -> None:
    inputs, targets = read_windows(stream, np.array([0, 123]), T)
    assert inputs.shape == targets.shape == (2, T)
    assert inputs[1].tolist() == VALUES[123 * T : 123 * T + T].tolist()


def test_a_split_is_planned() -> None:
    assert Split.plan(512, T, 8, None, 16) == Split(world=8, micro_batch=16)
    assert Split.plan(512, T, 8, None, 16).micro_steps(512) == 4
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


def test_divisors_are_all_of_them() -> None:
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_given_the_same_batches(stream: TokenStream) -> None:
    split, spans = Split(world=1, micro_batch=4), [(0, 64)]
    device = torch.device("cuda", 0)
    with Batches(stream, ORDER, split, rank=0, spans=spans, device=device) as batches:
        for on_gpu, on_cpu in zip(batches, load(stream, split, 0, spans), strict=True):
            assert all(part.device == device for part in on_gpu)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))
