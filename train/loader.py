"""Batches of the data order, split over ranks and micro-steps, fetched ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from train.order import DataOrder

AHEAD = 4  # micro-batches waiting: enough to ride out a slow read, little memory


class Tokens(Protocol):
    """One stream of tokens, such as ``pipeline.TokenStream``."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who computes which samples of a global batch.

        sample of (micro-step m, rank r, row b) = start + (m * world + r) * micro_batch + b

    Attributes:
        batch: Windows in the global batch.
        world: Processes.
        micro_batch: Windows that one process computes at a time.
    """

    batch: int
    world: int
    micro_batch: int

    @property
    def micro_steps(self) -> int:
        """Micro-steps in a step, the same on each rank."""
        return self.batch // (self.world * self.micro_batch)

    @classmethod
    def plan(
        cls, batch: int, block_size: int, world: int, micro_batch: int | None, largest: int
    ) -> Split:
        """Splits a batch.

        Args:
            batch: Windows in the global batch.
            block_size: Tokens a window.
            world: Processes.
            micro_batch: Windows at a time, or None: the largest divisor up to ``largest``.
            largest: What fits without being asked for.

        Raises:
            UserError: No even split; names the nearest that are.
        """
        if batch % world:
            raise UserError(
                f"train.batch_tokens: {batch * block_size} are {batch} sequences, which {world} "
                f"processes cannot share; nearest: {_around(batch, world, block_size)}, or set "
                f"processes (machine.yaml, GPT2_PROCESSES) to {_near_divisors(batch, world)}"
            )
        each = batch // world
        if micro_batch is None:
            micro_batch = max(n for n in _divisors(each) if n <= max(1, largest))
        elif each % micro_batch:
            raise UserError(
                f"micro_batch (machine.yaml, GPT2_MICRO_BATCH): {micro_batch} does not divide the "
                f"{each} sequences that each of {world} processes has a step; nearest: "
                f"{_near_divisors(each, micro_batch)}"
            )
        return cls(batch=batch, world=world, micro_batch=micro_batch)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _near_divisors(n: int, wanted: int) -> str:
    nearest = sorted(_divisors(n), key=lambda d: abs(d - wanted))[:2]
    return " or ".join(str(d) for d in sorted(nearest))


def _around(batch: int, world: int, block_size: int) -> str:
    below = batch // world * world
    return " or ".join(str(n * block_size) for n in (below, below + world) if n)


def read_windows(stream: Tokens, windows: np.ndarray, block_size: int) -> Tensor:
    """Reads windows of a stream.

    Returns:
        (len(windows), block_size + 1) int64: inputs are [:, :-1], targets [:, 1:].
    """
    rows = np.empty((len(windows), block_size + 1), dtype=np.int64)
    for row, window in zip(rows, windows.tolist(), strict=True):
        first = window * block_size
        row[:] = stream[first : first + block_size + 1]
    return torch.from_numpy(rows)


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """The micro-batches of one rank, in order, from a sample onwards.

    A context manager: a thread reads ahead between enter and exit. An error in the thread is
    raised again where the batch is asked for. What is read depends on ``start`` alone, so a loader
    has no state to save.

    Args:
        stream: The train split.
        order: Its order.
        split: How a global batch is shared.
        rank: Of this process.
        start: First global sample, a multiple of nothing in particular.
        steps: Global batches to deliver.
        device: Where the tensors go; pinned memory and an asynchronous copy on CUDA.
    """

    def __init__(
        self,
        stream: Tokens,
        order: DataOrder,
        split: Split,
        *,
        rank: int,
        start: int,
        steps: int,
        device: torch.device,
    ) -> None:
        self._stream, self._order, self._split, self._rank = stream, order, split, rank
        self._start, self._steps, self._device = start, steps, device
        self._queue: queue.Queue[Tensor | BaseException | None] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fetch, name="batches", daemon=True)

    def __enter__(self) -> Batches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next micro-batch: inputs and targets, each (micro_batch, block_size) int64."""
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        rows = item.to(self._device, non_blocking=True)
        # Contiguous, as all that the model is given: other strides would be compiled anew.
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _micro_batches(self) -> Iterator[np.ndarray]:
        split = self._split
        for step in range(self._steps):
            for micro in range(split.micro_steps):
                first = (micro * split.world + self._rank) * split.micro_batch
                start = self._start + step * split.batch + first
                yield self._order.samples(start, split.micro_batch)

    def _fetch(self) -> None:
        try:
            for windows in self._micro_batches():
                rows = read_windows(self._stream, windows, self._order.block_size)
                if self._device.type == "cuda":
                    rows = rows.pin_memory()
                if not self._put(rows):
                    return
            self._put(None)
        except BaseException as error:  # the loop raises it, with the thread's traceback
            self._put(error)

    def _put(self, item: Tensor | BaseException | None) -> bool:
        """Queues an item; False where nobody wants it any more."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
